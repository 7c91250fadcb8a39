from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import BudgetUnreachable, NothingPrunable
from secateur.parts.granularity.depth import Depth
from secateur.testing.toys import NETWORKS, toy, toy_batches


def test_branches_of_equal_cost_form_a_group():
    model, x = toy("resnet20")
    units = Depth().units(model, x, Scope())
    assert {group.partition(".{")[0]: shape[0] for group, shape in units.shapes.items()} == {
        "blocks.0": 3,
        "blocks.4": 2,
        "blocks.7": 2,
    }
    assert {
        group: shape[0] for group, shape in Depth().units(model, x, Scope(include=("blocks.7*",))).shapes.items()
    } == {"blocks.7.{conv1,bn1,conv2,bn2}": 1}


def test_a_branch_is_the_sum_of_its_parameters_and_its_gate_that_of_its_last_layer():
    model, x = toy("vit")
    units = Depth().units(model, x, Scope())
    values = {name: p.detach().abs() for name, p in units.parameters().items()}
    group = "blocks.0.{norm1,attention}"
    for i in (0, 1):
        names = [n for n in values if n.startswith((f"blocks.{i}.norm1.", f"blocks.{i}.attention."))]
        assert units.sum(values)[group][i] == pytest.approx(sum(float(values[n].sum()) for n in names))
        last = f"blocks.{i}.attention.proj."
        expected = sum(float(values[n].sum()) for n in names if n.startswith(last))
        assert units.sum(values, consumed=True)[group][i] == pytest.approx(expected)


def test_the_gate_is_the_derivative_by_a_factor_in_front_of_the_branch():
    model, x = toy("resnet20")
    units = Depth().units(model.double(), x.double(), Scope())
    factor = torch.ones((), dtype=torch.double, requires_grad=True)
    bn2 = model.blocks[1].bn2
    handle = bn2.register_forward_hook(lambda module, inputs, output: output * factor)
    loss = model(x.double()).square().sum()
    parameters = units.parameters()
    *slopes, expected = torch.autograd.grad(loss, [*parameters.values(), factor])
    handle.remove()
    products = {name: p.detach() * g for (name, p), g in zip(parameters.items(), slopes, strict=True)}
    assert float(units.sum(products, consumed=True)["blocks.0.{conv1,bn1,conv2,bn2}"][1]) == pytest.approx(
        float(expected)
    )


@pytest.mark.parametrize("method", ["magnitude", "random", "taylor"])
@pytest.mark.parametrize("network", ["vit", "resnet20"])
def test_methods_work_unchanged_and_files_load(method, network, tmp_path):
    model, x = toy(network)
    result = sc.prune(
        model, x, granularity="depth", method=method, data=toy_batches(network), budget=sc.Budget(macs=0.8)
    )
    assert result.rounds[-1].cost == result.after.macs <= 0.8 * result.before.macs
    assert result.proofs[-1].ok and type(result.model) is type(model)
    assert result.after.params == sum(p.numel() for p in result.model.parameters()) < result.before.params
    sc.save(result, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", build=NETWORKS[network][0])
    assert torch.equal(again(x), result.model(x)) and again.state_dict().keys() == result.model.state_dict().keys()


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_costs_are_exact(kind):
    model, x = toy("vit")
    result = sc.prune(model, x, granularity="depth", budget=sc.Budget(**{kind: 0.7}))
    assert result.rounds[-1].cost == getattr(result.after, kind)
    in_bytes = sc.prune(model, x, granularity="depth", budget=sc.Budget(bytes=result.before.bytes - 1))
    assert in_bytes.rounds[-1].cost == in_bytes.after.bytes


def test_in_steps_and_with_a_training_between(tmp_path):
    model, x = toy("resnet20")
    result = sc.prune(
        model,
        x,
        granularity="depth",
        budget=sc.Budget(macs=0.6),
        schedule={"name": "iterative", "steps": 3},
        recovery={"name": "fine-tune", "epochs": 3},
        data=toy_batches("resnet20"),
    )
    assert len(result.rounds) == len(result.proofs) == 3
    assert [r.cost for r in result.rounds] == sorted((r.cost for r in result.rounds), reverse=True)
    assert result.after.macs <= 0.6 * result.before.macs
    sc.save(result, tmp_path / "small.safetensors")
    assert torch.equal(sc.load(tmp_path / "small.safetensors", build=NETWORKS["resnet20"][0])(x), result.model(x))


def test_a_shallow_network_can_be_made_narrow_and_a_narrow_one_shallow():
    model, x = toy("vit")
    shallow = sc.prune(model, x, granularity="depth", budget=sc.Budget(macs=0.8)).model
    narrow = sc.prune(shallow, x, granularity="channel", budget=sc.Budget(macs=0.5))
    assert narrow.proofs[-1].ok
    both = sc.prune(narrow.model, x, granularity="depth", budget=sc.Budget(macs=0.8))
    assert both.proofs[-1].ok and both.after.macs <= 0.8 * narrow.after.macs


def test_the_original_weights_come_back():
    model, x = toy("vit")
    result = sc.prune(
        model,
        x,
        granularity="depth",
        budget=sc.Budget(macs=0.8),
        weights_from="init",
        checkpoints={"init": {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}},
    )
    assert all(bool((p == 1).all()) for p in result.model.parameters())


def test_minimum_and_reasons():
    model, x = toy("vit")
    with pytest.raises(BudgetUnreachable, match="cannot be met"):
        sc.prune(model, x, granularity={"name": "depth", "minimum": 2}, budget=sc.Budget(macs=0.9))
    with pytest.raises(NothingPrunable, match="no residual branch"):
        sc.prune(*toy("mlp"), granularity="depth", budget=sc.Budget(macs=0.9))
    with pytest.raises(NothingPrunable, match="outside the scope"):
        sc.prune(model, x, granularity="depth", scope=Scope(include=("head",)), budget=sc.Budget(macs=0.9))

    class Squashed(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.f(x).sigmoid()

    squashed = nn.Sequential(nn.Linear(4, 6), Squashed(), nn.Linear(6, 2))
    with pytest.raises(NothingPrunable, match="dropping it could not be proved"):
        sc.prune(squashed, torch.randn(2, 4), granularity="depth", budget=sc.Budget(macs=0.9))


def test_the_report_lists_branches():
    model, x = toy("vit")
    page = sc.prune(model, x, granularity="depth", budget=sc.Budget(macs=0.8)).report()
    assert "blocks.0.{norm1,attention}" in page and "dropped" in page
