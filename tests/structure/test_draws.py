"""Paths that depend on parameters: which draws a proof tries, and what counts as a look at values and as use."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure import draws
from secateur.structure.prove import prove_cut, proved_depth


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
    monkeypatch.setattr(draws, "FEWEST_DRAWS", 1)
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
    monkeypatch.setattr(draws, "FEWEST_DRAWS", 1)
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
    assert "a.weight" in draws.to_use(structure, ["a"]) and "aux.weight" not in draws.to_use(structure, ["a"])
    assert structure.axis("a").prunable and structure.verify(model).ok
