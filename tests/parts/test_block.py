"""Blocks of matrices as units."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.recipe import Recipe
from secateur.core.slots import Scope
from secateur.errors import InvalidRecipe, NotApplicable, PlanMismatch
from secateur.methods.snip import Snip
from secateur.methods.taylor import Taylor
from secateur.parts.granularity.block import Block
from secateur.parts.recovery.fine_tune import FineTune
from secateur.parts.weight_factors import WeightFactors
from secateur.testing.toys import NETWORKS, toy, toy_batches

FOUR = {"name": "block", "shape": [4, 4]}


def linear(rows=3, columns=5):
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1.0, rows * columns + 1).view(rows, columns))
    return layer, torch.ones(1, columns)


def blocks(model, x, shape=(2, 2), scope=None):
    return Block(shape=shape).units(model, x, scope or Scope())


def test_sums_are_hand_computed_also_at_the_edges():
    """Rows 1..5, 6..10, 11..15 in blocks of 2 x 2: two whole ones, and smaller ones below and to the right."""
    layer, x = linear()
    units = blocks(layer, x)
    found = {group: values.tolist() for group, values in units.sum({"weight": layer.weight.detach()}).items()}
    assert found == {
        "weight[2x2]": [[1.0 + 2 + 6 + 7, 3.0 + 4 + 8 + 9]],
        "weight[2x1]": [[5.0 + 10]],
        "weight[1x2]": [[11.0 + 12, 13.0 + 14]],
        "weight[1x1]": [[15.0]],
    }
    assert {group: tuple(shape) for group, shape in units.shapes.items()} == {
        "weight[2x2]": (1, 2), "weight[2x1]": (1, 1), "weight[1x2]": (1, 2), "weight[1x1]": (1, 1),
    }  # fmt: skip
    assert [units.size(group) for group in units.shapes] == [4, 2, 2, 1]


def test_kernels_of_convolutions_are_matrices_of_outputs_and_inputs_times_kernel_entries():
    conv = nn.Conv2d(2, 4, 3)
    units = blocks(conv, torch.randn(1, 2, 5, 5), (2, 9))
    per_input = conv.weight.detach().sum((2, 3))  # 9 columns are one input channel
    expected = torch.stack([per_input[:2].sum(0), per_input[2:].sum(0)])
    torch.testing.assert_close(units.sum({"weight": conv.weight.detach()})["weight[2x9]"], expected)


def test_a_matrix_that_is_smaller_than_a_block_is_one_and_biases_are_none():
    layer, x = linear()
    units = blocks(layer, x, (32, 32), Scope(biases=True))
    assert {group: shape.numel() for group, shape in units.shapes.items()} == {"weight[3x5]": 1}
    assert blocks(layer, x, (1, 1)).shapes == {"weight[1x1]": (3, 5)}


@pytest.mark.parametrize("network", ["mlp", "resnet20", "vit"])
def test_spreading_is_the_adjoint_of_summing(network):
    model, x = toy(network)
    units = blocks(model.double(), x.double(), (5, 7))
    entries = {name: torch.randn_like(p) for name, p in units.parameters().items()}
    values = {group: torch.randn(shape, dtype=torch.float64) for group, shape in units.shapes.items()}
    there = sum((units.sum(entries)[g] * v).sum() for g, v in values.items())
    back = sum((units.spread(values)[n] * e).sum() for n, e in entries.items())
    torch.testing.assert_close(there, back)
    total = sum(units.size(group) * shape.numel() for group, shape in units.shapes.items())
    assert total == sum(p.numel() for p in units.parameters().values())


def test_the_block_of_smallest_norm_goes():
    layer, x = linear(4, 4)
    with torch.no_grad():
        layer.weight[2:, :2] = 0.5
    pruned = sc.prune(layer, x, granularity={"name": "block", "shape": [2, 2]}, budget=sc.Budget(sparsity=0.25))
    expected = torch.ones(4, 4, dtype=torch.bool)
    expected[2:, :2] = False
    assert torch.equal(pruned.masks["weight"], expected)
    assert torch.equal(pruned.model.weight, layer.weight * expected)


@pytest.mark.parametrize("method", ["magnitude", "random", "taylor", "snip"])
def test_counts_are_exact_in_blocks_weights_and_multiply_adds(method):
    model, x = toy("resnet20")
    options = {"method": method, "granularity": FOUR, "data": toy_batches("resnet20")}
    if method == "snip":
        options["checkpoints"] = {"init": model.state_dict()}
    units = blocks(model, x, (4, 4))
    n = sum(shape.numel() for shape in units.shapes.values())
    largest = max(units.size(group) for group in units.shapes)

    def whole_blocks(pruned):
        kept = units.kept_in(pruned.masks)
        assert all(torch.equal(units.entries(name, kept), mask) for name, mask in pruned.masks.items())
        return sum(int(k.sum()) for k in kept.values())

    assert whole_blocks(sc.prune(model, x, budget=sc.Budget(sparsity=0.7), **options)) == int(0.3 * n + 1e-9)
    small = sc.prune(model, x, budget=sc.Budget(params=0.5), **options)
    whole_blocks(small)
    assert small.rounds[-1].cost == small.after.nonzero_params
    assert 0 <= 0.5 * small.before.params - small.after.nonzero_params < largest
    cheap = sc.prune(model, x, budget=sc.Budget(macs=0.5), **options)
    whole_blocks(cheap)
    assert cheap.rounds[-1].cost == pytest.approx(cheap.after.effective_macs)
    assert cheap.after.effective_macs <= 0.5 * cheap.before.macs


def test_a_layer_of_one_block_stays_unless_it_may_go():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 32)), torch.ones(1, 4)
    options = {"allocation": "uniform", "budget": sc.Budget(sparsity=0.6)}
    for minimum, expected in ((1, [1, 1]), (0, [0, 2])):
        pruned = sc.prune(model, x, granularity={"name": "block", "shape": [8, 8], "minimum": minimum}, **options)
        counts = [int(kept.sum()) for kept in blocks(model, x, (8, 8)).kept_in(pruned.masks).values()]
        assert counts == expected


def test_taylor_and_snip_have_their_closed_forms():
    model, x = toy("mlp")
    units, data = blocks(model, x, (5, 7)), toy_batches("mlp")[:1]
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    slopes = units.sum({name: p.detach() * p.grad for name, p in units.parameters().items()})
    for criterion, expected in ((Taylor(), torch.square), (Snip(), torch.abs)):
        for group, found in criterion.score(sc.Context(units, data)).items():
            torch.testing.assert_close(found, expected(slopes[group]))
    with pytest.raises(NotApplicable, match="Gates stand at channels"):
        Taylor(order=2).score(sc.Context(units, data))


def test_masks_hold_through_training_and_a_file_and_show_in_the_report(tmp_path):
    model, x = toy("mlp")
    pruned = sc.prune(
        model, x, granularity=FOUR, budget=sc.Budget(sparsity=0.6),
        data=toy_batches("mlp"), recovery=FineTune(epochs=2, lr=0.1),
    )  # fmt: skip
    for name, mask in pruned.masks.items():
        assert not mask.all() and not pruned.model.get_parameter(name)[~mask].any()
    sc.save(pruned, tmp_path / "small.safetensors")
    assert torch.equal(sc.load(tmp_path / "small.safetensors", build=NETWORKS["mlp"][0])(x), pruned.model(x))
    mask = pruned.masks["1.weight"]
    assert f"{100 * float(mask.float().mean()):.2f} %" in pruned.report()


def test_what_is_gone_stays_gone_from_cut_to_cut():
    model, x = toy("mlp")
    first = sc.prune(model, x, granularity=FOUR, budget=sc.Budget(sparsity=0.5))
    steps = {"name": "iterative", "steps": 3}
    second = sc.prune(first.model, x, granularity=FOUR, budget=sc.Budget(sparsity=0.8), schedule=steps)
    assert not any((mask & ~first.masks[name]).any() for name, mask in second.masks.items())
    total = sum(shape.numel() for shape in blocks(model, x, (4, 4)).shapes.values())
    assert (first.rounds[-1].cost, second.rounds[-1].cost) == (total // 2, int(0.2 * total + 1e-9))


def test_a_pruner_goes_on_from_a_checkpoint():
    def fresh():
        model, x = toy("mlp")
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"granularity": FOUR, "schedule": {"name": "iterative", "steps": 2, "span": 0.9}}
        return model, sgd, sc.Pruner(model, x, optimizers=sgd, total_steps=8, budget=sc.Budget(sparsity=0.6), **options)

    def train(model, sgd, pruner, steps):
        for inputs, target in (2 * toy_batches("mlp"))[pruner.steps : pruner.steps + steps]:
            sgd.zero_grad()
            F.cross_entropy(model(inputs), target).backward()
            sgd.step()
            pruner.step()

    model, sgd, pruner = fresh()
    train(model, sgd, pruner, 3)
    saved = copy.deepcopy((pruner.state_dict(), model.state_dict(), sgd.state_dict()))
    again, other_sgd, other = fresh()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    other_sgd.load_state_dict(saved[2])
    train(model, sgd, pruner, 5)
    train(again, other_sgd, other, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert len(other.rounds) == 2 and not any(again.get_parameter(n)[~m].any() for n, m in other.result().masks.items())
    saved[0]["masks"].pop("1.weight")
    with pytest.raises(PlanMismatch, match="of another model"):
        fresh()[2].load_state_dict(saved[0])


def test_factors_of_blocks_get_the_sum_of_their_entries_gradients():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)).double(), torch.randn(4, 5, dtype=torch.float64)
    units = blocks(model, x)
    factors = {g: torch.rand(shape, dtype=torch.float64, requires_grad=True) for g, shape in units.shapes.items()}
    only = {group: factors[group] for group in units.groups_of("0.weight")}
    plain = model[1].weight.detach().clone()
    with WeightFactors(units).applied(only):
        model(x).pow(2).sum().backward()
    assert torch.equal(model[1].weight, plain)
    spread = units.entries("0.weight", {group: factor.detach() for group, factor in only.items()})
    weight = (model[0].weight.detach() * spread).requires_grad_()
    (slope,) = torch.autograd.grad(model[1](F.linear(x, weight, model[0].bias)).pow(2).sum(), weight)
    expected = units.sum({"0.weight": slope * model[0].weight.detach(), "1.weight": plain})
    for group, factor in only.items():
        torch.testing.assert_close(factor.grad, expected[group])


def test_recipes_name_the_shape():
    recipe = Recipe(criterion="magnitude", granularity={"name": "block", "shape": [16, 8]})
    assert recipe.granularity == Block(shape=(16, 8)) and Block().shape == (32, 32)
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe and again.hash == recipe.hash
    assert recipe.hash != Recipe(criterion="magnitude", granularity="block").hash
    with pytest.raises(InvalidRecipe, match="shape"):
        Recipe(criterion="magnitude", granularity={"name": "block", "shape": [0, 8]})
