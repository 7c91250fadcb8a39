from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.context import Context
from secateur.core.layers import input_rows, weight_matrix
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, NotApplicable
from secateur.methods.thinet import ThiNet, greedy
from secateur.parts.contributions import Contributions
from secateur.parts.granularity.channel import Channel
from secateur.testing.toys import toy, toy_batches


def problem(kind):
    torch.manual_seed(0)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
        shape = (30, 5)
    elif kind == "flattened":
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
        shape = (30, 2, 4, 4)
    else:
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1, stride=2, bias=False), nn.Flatten()
        )
        shape = (30, 2, 5, 5)
    x = torch.randn(shape, dtype=torch.float64)
    units = Channel().units(model.double(), x[:1], Scope(include=("0",)))
    data = [(part, None) for part in x.split(7)]
    return model, x, units, data


def change(model, x, removed):
    """Mean over samples and positions of the squared change of the last layer's output, relative to its power."""
    hidden, last = model[:2](x).detach(), next(m for m in reversed(model) if not isinstance(m, nn.Flatten))
    flatten = isinstance(last, nn.Linear) and hidden.dim() == 4
    gone = torch.zeros_like(hidden)
    gone[:, list(removed)] = hidden[:, list(removed)]
    rows, lost = (input_rows(last, h.flatten(1) if flatten else h)[0] for h in (hidden, gone))
    weight = weight_matrix(last)[0]
    return float((lost @ weight.T).square().sum() / (rows @ weight.T).square().sum())


@pytest.mark.parametrize("kind", ["linear", "flattened", "convolution"])
def test_moments_give_the_change_of_the_output_for_every_set_of_units(kind):
    model, x, units, data = problem(kind)
    gram = Contributions(Context(units, data), units).gram("0")
    for n in range(1, 7):
        for removed in combinations(range(6), n):
            expected = change(model, x, removed)
            assert gram[list(removed)][:, list(removed)].sum() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", ["linear", "flattened", "convolution"])
def test_at_each_step_the_unit_leaves_with_which_the_output_changes_least(kind):
    model, x, units, data = problem(kind)
    context = Context(units, data)
    scores = ThiNet().score(context)["0"]
    assert context.samples_used == 30
    removed = []
    for unit in scores.argsort().tolist():
        errors = {j: change(model, x, [*removed, j]) for j in range(6) if j not in removed}
        assert errors[unit] == min(errors.values())
        if errors[unit] == max([errors[unit], *(change(model, x, removed[:i]) for i in range(1, len(removed) + 1))]):
            assert float(scores[unit]) == pytest.approx(errors[unit], rel=1e-9)
        removed.append(unit)


def test_greedy_is_hand_computed_and_always_rises():
    """Units 0 and 1 cancel, so that the second leaves for free; unit 2 is alone."""
    gram = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    assert greedy(gram).tolist() == [1.0, math.nextafter(1.0, 2.0), 4.0]


def test_several_readers_add_up_each_relative_to_its_own_power():
    model, x = toy("densenet")
    units = Channel().units(model, x, Scope())
    contributions = Contributions(Context(units, toy_batches("densenet")), units)
    last = contributions.gram("8.conv")  # its one reader also reads the axis "6"
    other = contributions.gram("6")
    assert float(last.sum()) < 1 and torch.linalg.eigvalsh(other).min() > -1e-12
    first = contributions.gram("0")  # four readers, of which the first reads nothing else
    assert float(first.sum()) > 1


def test_a_unit_that_nobody_needs_leaves_first_and_the_repair_loses_nothing():
    model, x, _, data = problem("convolution")
    with torch.no_grad():
        model[0].weight[3] = 2 * model[0].weight[1]
        model[0].bias[3] = 2 * model[0].bias[1]
        model[2].weight[:, 3] *= 0.01
    options = {"method": "thinet", "budget": sc.Budget(sparsity=1 / 6), "scope": Scope(include=("0",)), "data": data}
    pruned = sc.prune(model, x[:1], **options, repair={"name": "least-squares", "ridge": 0})
    assert pruned.structure_plan.axes["0"].kept == (0, 1, 2, 4, 5)
    torch.testing.assert_close(pruned.model(x), model(x), rtol=1e-8, atol=1e-8)


def test_with_the_repair_outputs_change_less_than_with_random_channels():
    model, x, _, data = problem("convolution")
    options = {
        "budget": sc.Budget(sparsity=0.5),
        "scope": Scope(include=("0",)),
        "data": data,
        "granularity": "channel",
    }
    error = lambda m: float((m(x) - model(x)).square().mean().detach())  # noqa: E731
    repaired = error(sc.prune(model, x[:1], method="thinet", **options).model)
    plain = error(sc.prune(model, x[:1], method="thinet", repair="none", **options).model)
    random = [error(sc.prune(model, x[:1], method="random", seed=s, **options).model) for s in range(3)]
    assert repaired < plain <= min(random) < max(random)  # a random draw may hit the same channels


def test_what_cannot_be_reconstructed_is_said():
    model, x = toy("mlp")
    with pytest.raises(DataNeeded):
        sc.prune(model, x, method="thinet", budget=sc.Budget(macs=0.5))
    with pytest.raises(NotApplicable, match="ThiNet works on channels"):
        sc.prune(model, x, method="thinet", granularity="weight", data=toy_batches("mlp"), budget=sc.Budget(macs=0.5))

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 4)

        def forward(self, x):
            return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)

    x = torch.randn(2, 5, 6)
    with pytest.raises(NotApplicable, match="No linear or two-dimensional convolutional layer reads the axis 'q'"):
        sc.prune(Squares(), x, method="thinet", data=[(x, None)], budget=sc.Budget(macs=0.9))
