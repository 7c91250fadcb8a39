"""Paths that depend on parameters: which draws a proof tries, and what counts as a look at values and as use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure import prove
from secateur.structure.draws import IN_VAIN, draws, to_use, tries
from secateur.structure.prove import prove_cut, proved_depth, proved_keep


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

    def __init__(self, secret) -> None:
        super().__init__()
        self.embed, self.route, self.head, self.secret = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(8, 3), secret
        self.up = nn.ModuleList(nn.Linear(8, 10) for _ in range(6))
        self.down = nn.ModuleList(nn.Linear(10, 8) for _ in range(6))

    def forward(self, x):
        y = self.embed(x)
        chosen, out = self.route(y).argmax(-1), torch.zeros_like(y)
        for i in range(6):
            hidden = self.up[i](y[chosen == i]).relu()
            out[chosen == i] = self.down[i](hidden / len(hidden.T) if i == self.secret else hidden)
        return self.head(y + out)


@pytest.mark.parametrize("expert", range(6))
def test_an_expert_that_runs_on_no_rows_has_not_been_used(expert):
    torch.manual_seed(expert)
    model, x = Looped(expert).eval(), torch.randn(2, 5)
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


def test_tries_go_on_while_they_find_something_and_end_in_vain():
    missing = {"a", "b", "c"}
    found_at = {3: "a", 3 + IN_VAIN: "b"}  # the latter is the last of as many as are tried in vain
    tried = []
    for i in tries(lambda: missing):
        tried.append(i)
        missing.discard(found_at.get(i))
    assert missing == {"c"} and tried == list(range(2 * (4 + IN_VAIN)))
    assert [*tries(lambda: ())] == [] and [*tries(lambda: (), least=3)] == [0, 1, 2]


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
