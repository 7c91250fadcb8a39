from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure.effective import effective, effective_params
from secateur.structure import rules
from secateur.testing.toys import resnet20


@pytest.fixture
def net():
    """4 inputs, 3 and 3 hidden units, 2 outputs, no zeros."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    return model


def count(model):
    return effective_params(model, torch.zeros(1, 4))


def test_without_zeros_every_parameter_has_an_effect(net):
    assert count(net) == 4 * 3 + 3 + 3 * 3 + 3 + 3 * 2 + 2 == 35


@torch.no_grad()
def test_a_unit_that_gives_nothing_takes_its_inputs_with_it(net):
    net[4].weight[:, 0] = 0  # 2 zeros; its 3 weights in and its bias have no effect
    assert count(net) == 35 - 2 - 3 - 1


@torch.no_grad()
def test_a_unit_that_gets_nothing_takes_its_outputs_with_it(net):
    net[0].weight[1] = 0  # 4 zeros; its 3 weights out and its bias have no effect
    assert count(net) == 35 - 4 - 3 - 1


@torch.no_grad()
def test_death_spreads_along_paths(net):
    net[0].weight[0] = 0
    net[2].weight[1, 1:] = 0  # unit 1 of the second layer hears only unit 0 of the first, which hears nothing
    # first layer: 4 + 1; second: column 0 (3), row 1 (2 more), bias 1; third: column 1 (2)
    assert count(net) == 35 - 5 - 3 - 2 - 1 - 2


@torch.no_grad()
def test_units_of_an_axis_that_cannot_be_proved_count_as_being_on_a_path(monkeypatch):
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x).cumsum(1))  # a unit that gives nothing still hears those before it

    def sums_units_whatever_their_order(call):
        call.tracer.consume("self", call["self"], [1])
        call.tracer.follow(call.out, call["self"], call.tracer.dims(call["self"]))

    monkeypatch.setitem(rules.all_rules(), "cumsum", sums_units_whatever_their_order)
    model = Summed().eval()
    model.a.weight[1:], model.a.bias[1:] = 0, 0
    found = effective(model, torch.zeros(3, 4))
    assert found.cut_off == {} and found.params == 4 + 1 + 6 * 2 + 2


@torch.no_grad()
def test_a_residual_stream_lives_as_long_as_one_writer_and_one_reader():
    torch.manual_seed(0)
    model = resnet20().eval()
    whole = effective_params(model, torch.zeros(1, 3, 16, 16))
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert whole == sum(p.numel() for p in model.parameters()) - zeros
    pruned = sc.prune(model, torch.zeros(1, 3, 16, 16), method="random", budget=sc.Budget(sparsity=0.97)).model
    effective = effective_params(pruned, torch.zeros(1, 3, 16, 16))
    assert effective < sum(int((p != 0).sum()) for p in pruned.parameters())


@torch.no_grad()
def test_units_that_are_cut_off_are_counted_on_both_sides(net):
    net[0].weight[0] = 0
    net[2].weight[1, 1:] = 0
    found = effective(net, torch.zeros(1, 4))
    assert found.cut_off == {"0": 1, "2": 1} and found.params == count(net)
    assert found.weights["0.weight"] == 8 and found.weights["4.weight"] == 4


@torch.no_grad()
def test_a_collapsed_layer_takes_all_others_with_it_and_the_report_says_so(net):
    x = torch.zeros(1, 4)
    net[2].weight.mul_(1e-6)
    pruned = sc.prune(net, x, method="magnitude", budget=sc.Budget(sparsity=0.5))
    assert pruned.collapsed == ("0.weight", "2.weight", "4.weight")
    page = pruned.report()
    assert "Warning, layer collapse: nothing of 0.weight, 2.weight, 4.weight" in page and "LAYER COLLAPSE" in page
    assert "Units without such a path: 6: 3 of 0, 3 of 2." in page
    assert pruned.effective_sparsity == 1 - 2 / 35 and "<b>94.29 %</b><span>effective sparsity" in page  # two biases
    healthy = sc.prune(net, x, method="magnitude", allocation="uniform", budget=sc.Budget(sparsity=0.3))
    assert healthy.collapsed == () and "layer collapse" not in healthy.report().lower()
