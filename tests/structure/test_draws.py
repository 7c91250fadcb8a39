"""Paths that depend on parameters: which draws a proof tries, and what counts as a look at values and as use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure import draws as draws_module
from secateur.structure import prove
from secateur.structure.draws import IN_VAIN, PATIENCE, draws, to_use, tries
from secateur.structure.prove import prove_cut, proved_depth, proved_keep
from secateur.structure.verify import Outputs


class Turning(nn.Module):
    """Takes, for some parameters, a way without parameters that no cut survives."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(5, 1)

    def forward(self, x):
        y = self.a(x).relu()
        if bool(self.gate(x).sum() > 0):
            y = y.cumsum(-1) / len(y.T)
        return self.b(y)


@pytest.mark.parametrize("seed", range(4))
def test_ways_without_parameters_are_tried_too(seed, monkeypatch):
    torch.manual_seed(0)
    model, x = Turning().eval(), torch.randn(2, 5)
    with torch.no_grad():
        model.gate.bias.fill_(-9)  # the trace goes straight on
    structure = sc.trace(model, x)
    assert structure.axis("a").prunable and structure.reads_values
    kept = {"a": torch.arange(12) < 6}
    assert "a" in structure.verify(model, seed).failed and not prove_cut(model, structure, kept, seed).ok
    monkeypatch.setattr(prove, "FEWEST_DRAWS", 1)
    assert any(prove_cut(model, structure, kept, s).ok for s in range(4))


class Dropping(nn.Module):
    """Adds its branch for some parameters only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.gate = nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(5, 1, bias=False)
        self.branch = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, x):
        y = self.embed(x)
        b = self.branch(y)
        return self.head(y + b if bool(self.gate(x).sum() > 0) else b)


def test_a_branch_is_dropped_only_if_every_draw_takes_the_traced_path(monkeypatch):
    monkeypatch.setattr(prove, "FEWEST_DRAWS", 1)
    torch.manual_seed(0)
    model, x = Dropping().eval(), torch.rand(2, 5)
    with torch.no_grad():
        model.gate.weight.fill_(1)
    assert [branch.prunable for branch in sc.trace(model, x).branches] == [True]
    for seed in range(4):
        assert not any(branch.prunable for branch in proved_depth(model, x, seed).branches)


class Looped(nn.Module):
    """Runs every expert, most on no rows; one divides by the number of its units in a way that no trace sees."""

    def __init__(self, secret, experts=6, prepared=lambda weight: weight) -> None:
        super().__init__()
        self.embed, self.route, self.head = nn.Linear(5, 8), nn.Linear(8, experts), nn.Linear(8, 3)
        self.up = nn.ModuleList(nn.Linear(8, 10) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(10, 8) for _ in range(experts))
        self.secret, self.prepared = secret, prepared

    def forward(self, x):
        y = self.embed(x)
        chosen, out = self.route(y).argmax(-1), torch.zeros_like(y)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            hidden = nn.functional.linear(y[chosen == i], self.prepared(up.weight), self.prepared(up.bias)).relu()
            out[chosen == i] = down(hidden / len(hidden.T) if i == self.secret else hidden)
        return self.head(y + out)


PREPARED = {
    "as it is": lambda weight: weight,
    "scaled": lambda weight: 1.0 * weight,
    "copied": lambda weight: torch.ones(1) * weight.clone(),
    "stacked": lambda weight: torch.stack([weight, weight])[0],
}


@pytest.mark.parametrize("expert", range(6))
@pytest.mark.parametrize("prepared", PREPARED)
def test_an_expert_that_runs_on_no_rows_has_not_been_used(expert, prepared):
    torch.manual_seed(expert)
    model, x = Looped(expert, prepared=PREPARED[prepared]).eval(), torch.randn(2, 5)
    structure = sc.trace(model, x)
    assert structure.axis(f"up.{expert}").prunable
    assert f"up.{expert}" in structure.verify(model).failed
    assert not prove_cut(model, structure, {f"up.{expert}": torch.arange(10) < 4}).ok


class Read(nn.Module):
    """Looks at what it has computed in one way or another."""

    def __init__(self, look) -> None:
        super().__init__()
        self.a, self.b, self.look = nn.Linear(5, 12), nn.Linear(12, 3), look
        self.register_buffer("ones", torch.ones(3, dtype=torch.long))

    def forward(self, x):
        y = self.a(x).relu()
        self.look(self, x, y)
        return self.b(y)


def written_into_a_view(model, x, y):
    z = torch.zeros_like(x)
    z[:, :1] = y.sum(-1, keepdim=True)
    return bool(z.sum() > 1e9)


@pytest.mark.parametrize(
    ("look", "found"),
    [
        (lambda model, x, y: bool(y.sum() > 1e9), True),
        (lambda model, x, y: x[y.sum(-1) > 0], True),
        pytest.param(
            lambda model, x, y: x[(y.sum(-1) > 0).to(torch.uint8)],
            True,
            marks=pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8"),
        ),
        (lambda model, x, y: x.masked_select(y.sum(-1, keepdim=True) > 0), True),
        (lambda model, x, y: x.repeat_interleave((y.sum(-1) > 0).long(), 0), True),
        (written_into_a_view, True),
        (lambda model, x, y: bool(x.sum() > 1e9), False),
        (lambda model, x, y: int(model.ones.sum()), False),
        (lambda model, x, y: x[y.sum(-1).argsort()], False),
    ],
)
def test_looks_at_values_that_follow_from_parameters_are_noticed(look, found):
    model = Read(look).eval()
    structure = sc.trace(model, torch.randn(3, 5))
    assert structure.reads_values is found
    assert structure.axis("a").prunable and structure.verify(model).ok


class Trained(nn.Module):
    """Has a head that runs in training alone, and reads its weight through a buffer in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(12, 2)
        self.register_buffer("w", self.a.weight.data)

    def forward(self, x):
        y = nn.functional.linear(x, self.w, self.a.bias).relu()
        if bool(y.sum() > 1e9):
            y = y * 1
        return (self.b(y), self.aux(y)) if self.training else self.b(y)


def test_what_only_training_uses_and_buffers_in_its_memory_do_not_refuse_a_cut():
    model = Trained().eval()
    structure = sc.trace(model, torch.randn(3, 5))
    assert structure.reads_values and structure.only_in_training == {"aux.weight", "aux.bias"}
    assert set(structure.order) >= structure.only_in_training
    held = to_use(structure, ["a"])["a"]
    assert "a.weight" in held and "aux.weight" not in held
    assert structure.axis("a").prunable and structure.verify(model).ok


def tried(found_at, missing, least=0):
    missing, numbers = set(missing), []
    for i in tries(lambda: missing, least):
        numbers.append(i)
        missing.discard(found_at.get(i))
    return missing, numbers


def test_tries_go_on_while_they_find_something_and_end_in_vain(monkeypatch):
    found_at = {3: "a", 3 + IN_VAIN: "b"}  # the latter is the last of as many as are tried in vain
    assert tried(found_at, "abc") == ({"c"}, list(range(4 + 2 * IN_VAIN)))
    assert tried({}, "") == (set(), []) and tried({}, "", least=3) == (set(), [0, 1, 2])
    ten = dict(enumerate("abcdefghij"))
    assert tried(ten, "abcdefghijk") == ({"k"}, list(range(10 + 10 * PATIENCE)))  # one of many may take long
    assert tried({**ten, 9 + 10 * PATIENCE: "k"}, "abcdefghijk") == (set(), list(range(10 + 10 * PATIENCE)))
    monkeypatch.setattr(draws_module, "MOST_DRAWS", 12)
    assert tried(ten, "abcdefghijk") == ({"k"}, list(range(12)))


def test_draws_are_as_many_as_there_are_paths_and_differ_between_seeds():
    one, several = (
        sc.trace(Read(look), torch.randn(3, 5)) for look in (lambda *_: None, lambda m, x, y: bool(y.sum()))
    )
    assert len([*draws(one, 0, (), 4)]) == 1 and [*draws(one, 0, (), 0)] == [*draws(several, 0, (), 0)] == []
    assert len({*draws(several, 0, ("a",), 4)} | {*draws(several, 1, ("a",), 4)}) == 2 * IN_VAIN


class Rare(nn.Module):
    """Takes a detour for the numbers that it was trained to, and for hardly any others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(5, 8), nn.Linear(5, 1), nn.Linear(8, 3)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.far, self.back = nn.Linear(8, 12), nn.Linear(12, 8)
        nn.init.constant_(self.gate.weight, 1e6)

    def forward(self, x):
        y = self.embed(x)
        y = y + self.down(self.up(y).relu())
        return self.head(y + self.back(self.far(y).relu()) if bool(self.gate(x).sum() > 1e6) else y)


def test_what_no_draw_has_used_is_to_blame_alone():
    model, x = Rare().eval(), torch.rand(2, 5) + 1
    structure = sc.trace(model, x)
    assert {axis.name for axis in structure.prunable} >= {"embed", "up", "far"}
    failed = structure.verify(model).failed
    assert failed.keys() == {"embed", "far"}  # the detour holds both
    assert failed["far"] == "no draw of the parameters has used back.weight: pass longer or more example inputs"
    kept = {"up": torch.arange(10) < 6, "far": torch.arange(12) < 6}
    refused = prove_cut(model, structure, kept)
    assert not refused.ok and refused.reason == failed["far"] and refused.max_error < 1e-5
    proof, left = proved_keep(model, structure, kept)
    assert proof.failed == {"far": failed["far"]}
    assert left.axis("up").prunable and not left.axis("far").prunable


def test_each_of_many_experts_is_proved_on_its_own():
    torch.manual_seed(0)
    model, x = Looped(None, experts=16).eval(), torch.randn(2, 5)
    structure = sc.trace(model, x)
    assert structure.verify(model).ok
    for i in range(16):  # some are first used after more draws than an axis alone would get
        assert prove_cut(model, structure, {f"up.{i}": torch.arange(10) < 5}).ok


def test_permutations_that_no_draw_has_used_are_not_proved():
    model, x = Rare().eval(), torch.rand(2, 5) + 1
    outputs = Outputs(model, sc.trace(model, x))
    assert outputs.error_with(["up"], torch.float32) < 1e-5 and outputs.error_with(["far"], torch.float32) == float(
        "inf"
    )


class Looking(nn.Module):
    """Looks at a parameter that takes part in nothing else, and returns one that nothing else meets."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.limit, self.extra = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        y = self.a(x)
        y = y.relu() if bool((self.limit * self.limit).sum() > 1) else y
        return self.b(y), (self.extra * 2).sum()


def test_parameters_that_are_looked_at_or_returned_are_used():
    model = Looking().eval()
    structure = sc.trace(model, torch.randn(2, 5))
    assert structure.reads_values and structure.verify(model).ok


class Sharing(nn.Module):
    """Has a second parameter in the memory of another one, and a path that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.down, self.up = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 6, bias=False)
        self.head = nn.Parameter(self.embed.weight.data)

    def forward(self, x):
        y = self.down(self.embed(x)).relu()
        return self.up(y if bool(y.sum() > 0) else 2 * y) @ self.head.T


def test_a_parameter_in_the_memory_of_another_one_is_used_with_it():
    model = Sharing().eval()
    structure = sc.trace(model, torch.randn(2, 6))
    assert structure.reads_values and "embed.weight" not in structure.order and structure.verify(model).ok


class Emptied(nn.Module):
    """Returns rows that hardly ever exist."""

    def __init__(self, looks) -> None:
        super().__init__()
        self.a, self.b, self.looks = nn.Linear(5, 8), nn.Linear(8, 3), looks

    def forward(self, x):
        y = self.b(self.a(x).relu())
        return y[y.sum(-1) > 1e9] if self.looks else y[:0]


@pytest.mark.parametrize("looks", [True, False])
def test_empty_outputs_prove_nothing(looks):
    model = Emptied(looks).eval()
    structure = sc.trace(model, torch.randn(2, 5))
    assert not structure.verify(model).ok
    assert not prove_cut(model, structure, {"a": torch.arange(8) < 4}).ok
    assert proved_keep(model, structure, {"a": torch.arange(8) < 4})[0].failed.keys() == {"a"}
