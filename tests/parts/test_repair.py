"""Repairs at a cut: what reads the cut units makes up for them, and statistics follow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.layers import input_rows, output_rows, weight_matrix
from secateur.core.recipe import Recipe
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, NotApplicable
from secateur.parts.granularity.channel import Channel
from secateur.parts.least_squares import Moments, regression
from secateur.parts.readers import kept_columns
from secateur.parts.repair.least_squares import LeastSquares, compensate
from secateur.structure.prove import half_of_each
from secateur.testing.toys import toy, toy_batches


def double(batches):
    return [(x.double(), y) for x, y in batches]


def error(layer, weight, bias, x, stay, z):
    """The mean squared error of a layer's output computed from some of its inputs."""
    rows = input_rows(layer, x)[:, :, stay]
    out = rows @ weight[:, :, stay].mT + (0 if bias is None else bias.view(weight.shape[0], 1, -1))
    return float((out.detach() - z).square().sum(-1).mean())


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (50, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (50, 6)),
    "convolution": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (9, 6, 5, 5)),
    "grouped": (lambda: nn.Conv2d(12, 4, 3, groups=2, padding="same", padding_mode="circular"), (9, 12, 5, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_no_other_weights_reproduce_the_output_better(case):
    torch.manual_seed(0)
    build, shape = LAYERS[case]
    layer = build().double()
    mix = torch.randn(shape[1], shape[1], dtype=torch.float64)
    x = torch.einsum("ij,nj...->ni...", mix, torch.randn(shape, dtype=torch.float64)) + 1
    z = output_rows(layer, layer(x)).detach()
    moments = Moments()
    for part in x.split(4):
        moments.add(input_rows(layer, part))
    per_channel = weight_matrix(layer).shape[-1] // 6
    stay = (torch.arange(6) != 2).logical_and(torch.arange(6) != 5).repeat_interleave(per_channel)
    plain = error(layer, weight_matrix(layer), layer.bias, x, stay, z)
    compensate(layer, moments, stay, 0.0)
    best = error(layer, weight_matrix(layer), layer.bias, x, stay, z)
    assert best < plain
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        move = lambda t: 1e-3 * torch.randn(t.shape, generator=generator, dtype=torch.float64)  # noqa: E731, B023
        weight = weight_matrix(layer) + move(weight_matrix(layer))
        bias = None if layer.bias is None else layer.bias.detach() + move(layer.bias)
        assert error(layer, weight, bias, x, stay, z) > best


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2])
def test_keeping_everything_leaves_the_weights_as_they_are(ridge):
    layer = nn.Conv2d(3, 4, 3).double()
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    moments = Moments()
    moments.add(input_rows(layer, torch.randn(4, 3, 6, 6, dtype=torch.float64)))
    compensate(layer, moments, torch.ones(27, dtype=torch.bool), ridge)
    assert torch.equal(before[0], layer.weight) and torch.equal(before[1], layer.bias)
    full = regression(weight_matrix(layer) @ moments.covariance, moments.covariance, 0.0)
    torch.testing.assert_close(full, weight_matrix(layer), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_units_that_depend_linearly_on_others_are_missed_by_nobody(kind):
    """Units 4 and 5 are affine functions of the others: after the cut and the repair the network is the same."""
    torch.manual_seed(0)
    layers = (nn.Linear(8, 6), nn.Linear(6, 3)) if kind == "linear" else (nn.Conv2d(8, 6, 1), nn.Conv2d(6, 3, 3))
    first, last = (layer.double() for layer in layers)
    with torch.no_grad():
        first.bias += 40  # every rectifier is open
        first.weight[4], first.bias[4] = first.weight[0] - 2 * first.weight[1], 50
        first.weight[5], first.bias[5] = first.weight[2] * 0.5, 20
        first.weight[:4] *= 3
        first.weight[4:] *= 0.1
    model = nn.Sequential(first, nn.ReLU(), last, nn.Flatten())
    shape = (16, 8) if kind == "linear" else (16, 8, 5, 5)
    data = [(torch.randn(shape, dtype=torch.float64), torch.zeros(16).long()) for _ in range(3)]
    options = {"method": "magnitude", "granularity": "channel", "budget": sc.Budget(sparsity=1 / 3), "data": data}
    repaired = sc.prune(model, data[0][0], **options, repair={"name": "least-squares", "ridge": 0})
    assert repaired.model[0].weight.shape[0] == 4
    torch.testing.assert_close(repaired.model(data[1][0]), model(data[1][0]), rtol=1e-7, atol=1e-7)
    plain = sc.prune(model, data[0][0], **options)
    assert (plain.model(data[1][0]) - model(data[1][0])).abs().max() > 1


@pytest.mark.parametrize("network", ["resnet20", "densenet", "grouped", "vit", "mobilenet"])
def test_every_reader_of_a_cut_axis_comes_closer_to_its_own_output(network):
    model, x = toy(network)
    model = model.double()
    data = double(toy_batches(network))
    units = Channel().units(model, x.double(), Scope())
    axes = [axis.name for axis in units.structure.prunable]
    kept = half_of_each(units.structure, axes, 0)
    columns = kept_columns(units, kept)
    cut = [axis for axis in units.structure.prunable if not bool(kept[axis.name].all())]
    assert columns.keys() == {n for axis in cut for n, i in axis.members if units.consumes(n, i)}
    inputs, before = {}, {}
    for name in columns:
        layer = model.get_submodule(name.removesuffix(".weight"))
        before[name] = weight_matrix(layer).clone(), layer.bias if layer.bias is None else layer.bias.detach().clone()
        layer.register_forward_hook(lambda m, i, o, n=name: inputs.setdefault(n, []).append(i[0].detach()))
    context = sc.Context(units, data)
    LeastSquares().before_cut(context, kept)
    assert context.samples_used == sum(len(x) for x, _ in data)
    for name, stay in columns.items():
        layer, rows = model.get_submodule(name.removesuffix(".weight")), torch.cat(inputs[name])
        weight, bias = before[name]
        z = input_rows(layer, rows) @ weight.mT + (0 if bias is None else bias.view(weight.shape[0], 1, -1))
        after = error(layer, weight_matrix(layer), layer.bias, rows, stay, z)
        assert after < error(layer, weight, bias, rows, stay, z)


def test_a_tied_weight_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            y = self.embed(x)
            return self.head(y + self.mid(y).relu())

    units = Channel().units(Tied(), torch.arange(4)[None], Scope())
    kept = half_of_each(units.structure, [axis.name for axis in units.structure.prunable], 0)
    assert set(kept_columns(units, kept)) == {"mid.weight"}


def test_moments_do_not_depend_on_the_batches_and_large_means_cost_no_precision():
    x = torch.randn(2, 90, 5, dtype=torch.float64) + 1e7
    whole, parts = Moments(), Moments()
    whole.add(x)
    for part in x.split((1, 50, 39), 1):
        parts.add(part)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(whole.covariance[1], torch.cov(x[1].T, correction=0))
    torch.testing.assert_close(parts.mean, x.mean(1))
    assert parts.count == 90


def test_inputs_that_never_vary_take_no_part():
    covariance = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    cross = torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64)
    for ridge in (0.0, 1e-9):
        torch.testing.assert_close(regression(cross, covariance, ridge), cross / 2, rtol=1e-6, atol=1e-6)
    assert torch.equal(regression(cross, 0 * covariance, 1e-6), 0 * cross)


def test_statistics_are_the_averages_over_the_batches():
    model, x = toy("resnet20")
    data = toy_batches("resnet20", n=3)
    options = {"granularity": "channel", "budget": sc.Budget(macs=0.5), "data": data}
    plain = sc.prune(model, x, **options).model
    fresh = sc.prune(model, x, **options, repair="recalibrate").model
    first = plain.conv1
    means, variances = [], []
    with torch.no_grad():
        for inputs, _ in data:
            y = first(inputs).transpose(0, 1).flatten(1)
            means.append(y.mean(1))
            variances.append(y.var(1))
    torch.testing.assert_close(fresh.bn1.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(fresh.bn1.running_var, torch.stack(variances).mean(0))
    assert all(m.momentum == 0.1 and not m.training for m in fresh.modules() if isinstance(m, nn.BatchNorm2d))
    assert torch.equal(plain.fc.weight, fresh.fc.weight)


def test_several_repairs_follow_each_other_and_a_recipe_file_says_so():
    model, x = toy("resnet20")
    repair = {"name": "several", "repairs": ["least-squares", {"name": "recalibrate"}]}
    recipe = Recipe(criterion="magnitude", granularity="channel", repair=repair)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert recipe.model_dump(mode="json")["repair"]["repairs"][1] == {"name": "recalibrate"}
    data = toy_batches("resnet20")
    options = {"method": recipe, "budget": sc.Budget(macs=0.5), "data": data}
    both = sc.prune(model, x, **options).model
    first = sc.prune(model, x, **options, repair="least-squares").model
    assert torch.equal(both.fc.weight, first.fc.weight) and not torch.equal(both.bn1.running_var, first.bn1.running_var)


def test_what_cannot_be_repaired_is_said():
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="has none"):
        sc.prune(model, x, budget=sc.Budget(sparsity=0.5), data=toy_batches("mlp"), repair="recalibrate")
    with pytest.raises(NotApplicable, match="works on channels"):
        sc.prune(model, x, budget=sc.Budget(sparsity=0.5), data=toy_batches("mlp"), repair="least-squares")
    with pytest.raises(DataNeeded):
        sc.prune(model, x, budget=sc.Budget(macs=0.5), granularity="channel", repair="least-squares")


def test_the_repair_works_inside_a_loop_of_the_users():
    model, x = toy("mlp")
    data = toy_batches("mlp")
    dense = [p.detach().clone() for p in model.parameters()]
    options = {"granularity": "channel", "budget": sc.Budget(macs=0.5), "data": data, "repair": "least-squares"}
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = sc.prune(model, x, **options).model
    pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=2, **options)
    pruner.step()
    assert len(dense) == len(list(model.parameters())) and torch.equal(model[3].weight, expected[3].weight)
