from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import NothingPrunable
from secateur.structure.prove import proved_structure


class Mixture(nn.Module):
    """Each row goes through the one expert that the router prefers; all experts run in one grouped product."""

    def __init__(self, width, hidden, experts):
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, width), nn.Linear(width, experts), nn.Linear(width, 3)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)

    def forward(self, x):
        x = self.stem(x)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = torch.histc(chosen.float(), self.router.out_features, 0, self.router.out_features - 1).cumsum(0).int()
        rows = F.grouped_mm(F.grouped_mm(x[order], self.up, offs=ends).relu(), self.down, offs=ends)
        return self.head(x + (weight[order, None] * rows)[order.argsort()])


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    return Mixture(16, 32, 4).eval(), torch.randn(20, 5)


def by_role(structure):
    return {axis.role: axis for axis in structure.axes if axis.role}


def test_grouped_products_run_only_on_multiples_so_their_widths_leave_in_steps(mixture):
    structure = proved_structure(*mixture)
    stream, hidden = by_role(structure)["residual stream"], by_role(structure)["hidden unit"]
    assert (stream.size, hidden.size, stream.prunable, hidden.prunable) == (16, 32, True, True)
    assert structure.steps == {stream.name: 8, hidden.name: 8} and structure.ties == ()
    assert not by_role(structure)["expert"].prunable


@pytest.mark.parametrize(("granularity", "width"), [("hidden", "hidden"), ("residual", "stream")])
def test_a_cut_of_the_experts_is_proved(mixture, granularity, width):
    result = sc.prune(*mixture, granularity=granularity, budget=sc.Budget(params=0.8))
    _, stream, hidden = result.model.up.shape
    assert result.proofs[-1].ok and (stream, hidden) in {"hidden": [(16, 24), (16, 16)], "stream": [(8, 32)]}[width]


def test_a_width_that_is_no_multiple_is_left_alone():
    torch.manual_seed(0)
    structure = sc.trace(Mixture(16, 12, 4).eval(), torch.randn(20, 5))
    assert "must stay a multiple of 8" in by_role(structure)["hidden unit"].reason


def test_a_branch_of_which_only_a_part_is_a_module_stays(mixture):
    with pytest.raises(NothingPrunable, match="dropping it could not be proved"):
        sc.prune(*mixture, granularity="depth", budget=sc.Budget(macs=0.9))


def test_whole_experts_are_not_removed_and_the_reason_is_said(mixture):
    with pytest.raises(NothingPrunable, match="rows are assigned to groups by value"):
        sc.prune(*mixture, granularity="expert", budget=sc.Budget(params=0.9))
