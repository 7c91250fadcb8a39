"""The masked network where the path depends on values, so that what consumes units is known only as it runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import StructureError
from secateur.structure import draws
from secateur.structure.inputs import Inputs, relative_error, state_of
from secateur.structure.masked import run_masked
from secateur.structure.prove import prove_cut


class Routed(nn.Module):
    """Runs the experts that any row chooses, one after the other, and no others."""

    def __init__(self, experts=4, width=lambda i: 6 + i) -> None:
        super().__init__()
        self.embed, self.route = nn.Linear(5, 8), nn.Linear(8, experts)
        self.up = nn.ModuleList(nn.Linear(8, width(i)) for i in range(experts))
        self.down = nn.ModuleList(nn.Linear(width(i), 8) for i in range(experts))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.embed(x)
        chosen = self.route(y).argmax(-1)
        out = torch.zeros_like(y)
        for i in chosen.unique().tolist():
            out[chosen == i] = self.down[i](self.up[i](y[chosen == i]).relu_())
        return self.head(self.norm(y.add_(out)))


HALF = {f"up.{i}": torch.arange(6 + i) % 2 == 0 for i in range(4)}


@pytest.fixture
def routed():
    torch.manual_seed(0)
    return Routed().eval(), torch.randn(9, 5)


def zeroed(model, x, hidden):
    """Return the output with hidden units of the experts multiplied by zero; written out by hand."""
    y = model.embed(x)
    chosen = model.route(y).argmax(-1)
    rows = [model.down[i](model.up[i](row).relu() * hidden[i]) for row, i in zip(y, chosen.tolist(), strict=True)]
    return model.head(model.norm(y + torch.stack(rows))), chosen


def test_units_are_masked_on_a_path_that_was_not_traced(routed):
    model, x = routed
    structure = sc.trace(model, x)
    assert all(structure.axis(name).prunable for name in HALF)
    paths = set()
    for seed in range(6):
        other = 4 * torch.randn(9 - seed, 5, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected, chosen = zeroed(model, other, list(HALF.values()))
            found = run_masked(model, structure, HALF, state_of(model), Inputs((other,), {}))
        assert relative_error(found, expected) < 1e-6
        assert relative_error(found, model(other)) > 1e-3
        paths.add(tuple(chosen.unique().tolist()))
    assert len(paths) > 2


def test_cuts_are_proved_where_the_path_depends_on_values(routed):
    model, x = routed
    structure = sc.trace(model, x)
    widths = {axis.name for axis in structure.prunable}
    assert widths >= {"embed", *(f"up.{i}" for i in range(4))}
    for seed in range(4):  # other weights, other paths
        assert structure.verify(model, seed).ok
        assert prove_cut(model, structure, {"embed": torch.arange(8) < 5, "up.2": torch.arange(8) > 4}, seed).ok
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(params=0.6))
    assert pruned.proofs[-1].ok and pruned.after.params <= 0.6 * pruned.before.params
    assert pruned.model(x).shape == (9, 3)


@pytest.mark.parametrize("expert", range(6))
def test_a_wrong_expert_is_reached_though_the_example_inputs_choose_few(expert):
    torch.manual_seed(expert)
    model, x = Routed(6, width=lambda i: 8).eval(), torch.randn(2, 5)
    structure = sc.trace(model, x)
    assert structure.verify(model).ok
    other = structure.axis(f"up.{(expert + 1) % 6}")
    wrong = {**structure.tensors, f"down.{expert}.weight": (structure.tensors[f"down.{expert}.weight"][0], other.leaf)}
    broken = dataclasses.replace(structure, tensors=wrong)
    assert not broken.verify(model).ok
    assert not prove_cut(model, broken, {other.name: torch.arange(8) < 4}).ok
    assert not prove_cut(model, broken, {f"up.{expert}": torch.arange(8) < 4}).ok


def test_the_structure_is_as_it_was_after_a_masked_run(routed):
    model, x = routed
    structure = sc.trace(model, x)
    before = repr(structure.tensors), [axis.reason for axis in structure.axes]
    run_masked(model, structure, {"embed": torch.arange(8) < 5}, state_of(model), Inputs((-x,), {}))
    assert (repr(structure.tensors), [axis.reason for axis in structure.axes]) == before
    assert all(axis.leaf.find() is axis.leaf for axis in structure.axes)


class Accumulated(nn.Module):
    """Adds what an expert computes to a tensor in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.up = nn.Linear(5, 3), nn.ModuleList([nn.Linear(5, 8), nn.Linear(5, 8)])
        self.down, self.gate = nn.ParameterList(torch.randn(8, 3) for _ in range(2)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        i = int(self.gate * x.sum() > 0)
        return self.start(x).addmm_(self.up[i](x).relu(), self.down[i])


def test_an_operation_in_place_happens_once():
    model, x = Accumulated().eval(), torch.rand(4, 5)
    structure = sc.trace(model, x)
    kept = {"up.0": torch.arange(8) < 3, "up.1": torch.arange(8) > 3}
    for inputs, i in ((x, 1), (-x, 0)):
        with torch.no_grad():
            found = run_masked(model, structure, kept, state_of(model), Inputs((inputs,), {}))
            hidden = model.up[i](inputs).relu() * kept[f"up.{i}"]
            assert relative_error(found, model.start(inputs) + hidden @ model.down[i]) < 1e-6


class Joined(nn.Module):
    """Adds two layers up where the inputs are positive: on the other path they have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)
        self.c, self.d = nn.Linear(8, 3), nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        a, b = self.a(x).relu(), self.b(x).relu()
        if bool((self.gate * x > 0).all()):
            a = (a + b).softmax(-1)
        return self.c(a) + self.d(b)


def test_a_path_that_makes_two_axes_one_is_refused():
    model, x = Joined().eval(), torch.rand(3, 4)
    structure = sc.trace(model, -x)
    assert {axis.name for axis in structure.prunable} == {"a", "b"}
    kept = {"a": torch.arange(8) < 4, "b": torch.arange(8) >= 4}
    with torch.no_grad():
        same_path = run_masked(model, structure, kept, state_of(model), Inputs((-2 * x,), {}))
        assert same_path.shape == (3, 3)
        with pytest.raises(StructureError, match="other axes"):
            run_masked(model, structure, kept, state_of(model), Inputs((x,), {}))


def test_units_that_stay_whole_do_not_refuse_the_cut_of_others():
    model, x = Joined().eval(), torch.rand(3, 4)
    structure = sc.trace(model, -x)
    kept = {"a": torch.ones(8, dtype=torch.bool), "b": torch.ones(8, dtype=torch.bool)}
    with torch.no_grad():
        found = run_masked(model, structure, kept, state_of(model), Inputs((x,), {}))
        assert torch.equal(found, model(x))


class Normalized(nn.Module):
    """Divides by the number of units, counted before they meet the layer's; looks at the inputs, or at a parameter."""

    def __init__(self, read) -> None:
        super().__init__()
        self.a, self.b, self.hidden, self.read = nn.Linear(4, 8), nn.Linear(8, 3), 8, read

    def forward(self, x):
        if bool((self.a.bias if self.read == "parameter" else x).sum() > 0):
            x = x * 1
        ones = torch.ones(x.shape[0], self.hidden)
        number = ones.sum(-1, keepdim=True)
        return self.b(self.a(x).relu() * ones / number)


@pytest.mark.parametrize(("read", "proved"), [("inputs", True), ("parameter", False)])
def test_only_where_the_path_depends_on_parameters_is_it_followed_anew(read, proved):
    model = Normalized(read).eval()
    structure = sc.trace(model, torch.randn(3, 4))
    assert structure.reads_values is not proved and structure.axis("a").prunable
    assert structure.verify(model).ok is proved  # a right cut that is refused: what is summed up meets the units later
    assert len([*draws.draws(structure, 0, (), 4)]) == (1 if proved else 4)


class Branched(nn.Module):
    """A branch of experts among others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.first, self.second = (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.embed(x)
        y = y + self.first(y)
        if bool(self.scale > 1e6):
            y = y.tanh()
        return self.head(y + self.second(y))


def test_branches_are_dropped_on_the_traced_path():
    model, x = Branched().eval(), torch.randn(3, 5)
    structure = sc.trace(model, x)
    assert structure.reads_values and {branch.name for branch in structure.branches} == {"first", "second"}
    for given in (structure, structure.cut({})):
        for branch in structure.branches:
            assert prove_cut(model, given, {branch.name: torch.zeros(1, dtype=torch.bool)}).ok
    axes = {"embed": torch.arange(8) < 5, "first": torch.ones(1, dtype=torch.bool)}
    assert prove_cut(model, structure, axes).ok


def test_a_buffer_that_the_model_writes_to_is_each_networks_own():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("n", torch.ones(()))

        def forward(self, x):
            self.n.add_(1)
            return self.b(self.a(x).relu()) * self.n

    model = Counting().eval()
    structure = sc.trace(model, torch.randn(3, 4))
    assert prove_cut(model, structure, {"a": torch.arange(8) < 4}).ok and structure.verify(model).ok
    assert float(model.n) == 1
