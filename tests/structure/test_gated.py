"""Convolutions that compute, for one input, only the channels that matter, from only those that are not zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.core.slots import Scope
from secateur.errors import PlanMismatch
from secateur.parts.granularity.channel_per_input import GatedUnits
from secateur.structure.gated import GatedConv2d, gates_of, largest
from secateur.structure.inputs import as_inputs
from secateur.structure.plan import ConvolutionGate, Plan
from secateur.structure.surgery import apply_plan
from secateur.structure.weightless import KnownValues
from secateur.tasks.networks import build_network


def gated_layer(c_in=5, c_out=6, winners=None, dtype=torch.float64, **options):
    norm = nn.BatchNorm2d(c_out, dtype=dtype)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    gate = GatedConv2d(nn.Conv2d(c_in, c_out, 3, dtype=dtype, **options), norm).eval()
    gate.winners = winners or c_out
    return gate


def resnet8(dtype=torch.float64, width=8):
    """With statistics, shifts, and scales of both signs, very small ones and zeros among them."""
    model = build_network("resnet8", width, 16, 3).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
            with torch.no_grad():
                module.weight[:2] = torch.tensor([0.0, 1e-4])
    return model.eval()


def gated_resnet8(density=0.5, dtype=torch.float64, deviation=0.3):
    model = resnet8(dtype)
    units = GatedUnits(model, as_inputs(torch.zeros(1, 3, 16, 16, dtype=dtype)), Scope())
    for gate in units.gates.values():
        nn.init.normal_(gate.saliency.weight, std=deviation)
        gate.winners = max(1, int(density * gate.winners))
    return model


@torch.no_grad()
def masked(model, x):
    """The output for each sample, with all channels computed."""
    return model(torch.cat([x, x]))[: len(x)]


def worst(a, b):
    return float((a - b).abs().max() / b.abs().max())


def test_with_all_channels_and_untrained_saliencies_it_is_the_dense_network():
    dense, x = resnet8(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model = copy.deepcopy(dense)
    units = GatedUnits(model, as_inputs(x), Scope())
    assert len(units.gates) == 9  # every convolution of a ResNet-8, projections too
    with torch.no_grad():
        assert worst(model(x), dense(x)) < 1e-12
        assert worst(model(x[:1]), dense(x[:1])) < 1e-12
    model.train(), dense.train()  # batch statistics are those of all channels
    with torch.no_grad():
        assert worst(model(x), dense(x)) < 1e-12


@pytest.mark.parametrize("winners", [1, 3, 6])
def test_exactly_k_channels_win_for_each_sample_and_among_equals_the_first(winners):
    gate = gated_layer(c_in=6, c_out=6, winners=winners)
    with torch.no_grad():
        gate.saliency.weight.copy_(torch.eye(6))
        gate.saliency.bias.zero_()
    saliencies = torch.tensor([[3, 1, 2, 6, 5, 4], [1, 1, 1, 1, 1, 1], [0, 2, 0, 2, 0, 0], [0, 0, 0, 0, 0, 0]]).double()
    best_first = [[3, 4, 5, 0, 2, 1], [0, 1, 2, 3, 4, 5], [1, 3, 0, 2, 4, 5], [0, 1, 2, 3, 4, 5]]
    won = torch.zeros(4, 6, dtype=torch.bool)
    for row, order in enumerate(best_first):
        won[row, order[:winners]] = True
    assert torch.equal(largest(saliencies, winners), won)  # zeros win, too, if there is nothing else
    assert torch.equal(gate.gates(saliencies), saliencies * won)


def test_the_output_by_hand():
    gate = gated_layer(c_in=2, c_out=3, winners=2, bias=False)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        gate.saliency.weight.normal_()
        gate.saliency.bias.fill_(1.0)
        out = gate(x)
        for n in range(3):
            g = torch.relu(gate.saliency.weight @ x[n].abs().mean((1, 2)) + 1)
            loser = int(g.argmin())
            for c in range(3):
                conv = torch.conv2d(x[n : n + 1], gate.convolution.weight[c : c + 1])[0, 0]
                normalized = (conv - gate.norm.running_mean[c]) / (gate.norm.running_var[c] + gate.norm.eps).sqrt()
                y = g[c] * (gate.norm.weight[c] * normalized + gate.norm.bias[c])
                assert torch.allclose(out[n, c], torch.zeros_like(y) if c == loser else y)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"stride": 2, "padding": 1}, {"padding": 2, "padding_mode": "reflect"}]
)
def test_what_is_computed_in_part_is_what_is_masked(options):
    gate = gated_layer(winners=2, **options)
    nn.init.normal_(gate.saliency.weight)
    x = torch.randn(1, 5, 9, 9, dtype=torch.float64)
    x[:, [0, 3]] = 0
    with torch.no_grad():
        assert worst(gate(x), masked(gate, x)) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("density", [1, 0.5, 0.25])
def test_a_resnet_that_skips_computes_what_the_masked_one_computes(density, dtype, limit):
    model = gated_resnet8(density, dtype)
    for x in torch.randn(3, 1, 3, 16, 16, dtype=dtype):
        with torch.no_grad():
            assert worst(model(x), masked(model, x)) < limit


def test_ties_and_gates_that_are_all_zero_are_skipped_alike():
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    model = gated_resnet8(deviation=0)
    for gate in gates_of(model).values():
        nn.init.ones_(gate.saliency.bias)  # all equal
    with torch.no_grad():
        assert worst(model(x), masked(model, x)) < 1e-12
        for gate in gates_of(model).values():
            gate.saliency.bias.fill_(-1)
        assert torch.equal(model(x), masked(model, x))
        assert torch.equal(model(x)[0], model.fc.bias)  # nothing reaches the head


@pytest.fixture
def convolved(monkeypatch):
    """How many channels each convolution has read and computed, by module."""
    found = {}
    convolve = nn.Conv2d._conv_forward

    def seen(self, x, weight, bias):
        assert x.shape[1] == weight.shape[1]
        found[self] = (weight.shape[1], weight.shape[0])
        return convolve(self, x, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", seen)
    return found


@torch.no_grad()
def test_only_chosen_channels_are_computed_from_channels_that_are_not_zero(convolved):
    model = gated_resnet8(density=0.25, deviation=0)
    gates = gates_of(model)
    model(torch.randn(1, 3, 16, 16, dtype=torch.float64))
    assert convolved[gates["conv1"].convolution] == (3, 2)
    assert convolved[gates["blocks.0.conv1"].convolution] == (2, 2)  # of eight
    read, computed = convolved[gates["blocks.2.conv2"].convolution]
    assert computed == 8 and read <= 8  # of 32; what the ReLU before it has made zero is not read either
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert convolved[gates["blocks.2.conv2"].convolution] == (32, 32)  # in a batch all of them


@torch.no_grad()
def test_nothing_is_skipped_while_operations_are_traced_or_compiled(convolved, monkeypatch):
    gate, x = gated_layer(winners=2), torch.randn(1, 5, 7, 7, dtype=torch.float64)
    gate(x)
    assert convolved[gate.convolution] == (5, 2)
    with KnownValues():
        gate(x)
    assert convolved.pop(gate.convolution) == (5, 6)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gate(x)
    assert convolved.pop(gate.convolution) == (5, 6)


def test_gradients_reach_the_winners_predictors_and_nothing_else():
    gate = gated_layer(winners=2)
    nn.init.normal_(gate.saliency.weight)
    x = torch.randn(1, 5, 7, 7, dtype=torch.float64)
    for batch in (x, torch.cat([x, x])):  # skipped and masked
        gate.zero_grad()
        out = gate(batch)
        out.square().sum().backward()
        won = out[0].flatten(1).any(1)
        assert int(won.sum()) == 2
        gradient = gate.saliency.weight.grad
        assert gradient[won].abs().min() > 0 and not gradient[~won].any()
        assert not gate.saliency.bias.grad[~won].any() and gate.saliency.bias.grad[won].all()
    gate.zero_grad()
    assert torch.autograd.gradcheck(gate, torch.cat([x, x + 0.1]).requires_grad_())


def test_the_scale_of_the_normalization_is_fixed_and_follows_no_optimizer():
    gate = gated_layer().train()
    before = gate.norm.weight.clone()
    assert not gate.norm.weight.requires_grad and gate.norm.bias.requires_grad
    sgd = torch.optim.SGD(gate.parameters(), lr=0.1, weight_decay=0.1)
    gate(torch.randn(4, 5, 7, 7, dtype=torch.float64)).square().sum().backward()
    sgd.step()
    assert torch.equal(gate.norm.weight, before)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            ConvolutionGate(convolution="conv9", norm="bn1", winners=2),
            "'conv9' and expects a Conv2d, got no such module",
        ),
        (ConvolutionGate(convolution="conv1", norm="fc", winners=2), "'fc' and expects a BatchNorm2d, got Linear"),
    ],
)
def test_a_plan_with_gates_for_another_network_is_refused(gate, message):
    with pytest.raises(PlanMismatch, match=message):
        apply_plan(resnet8(), Plan(gated=(gate,)))
