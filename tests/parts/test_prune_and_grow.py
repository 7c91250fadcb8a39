"""Exchanging weights, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.engine import Run
from secateur.core.hooks import TrainingState
from secateur.core.recipe import Recipe
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.methods.rigl import RigL
from secateur.testing.toys import toy


def started(drop=0.5, updates=4, until=1.0):
    """One row of six weights, of which the first four are kept, in the middle of the first exchange."""
    model = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 0.1, 3.0, 0.2, 0.3, 0.3]]))
    recipe = Recipe(criterion=RigL(drop=drop, updates=updates, until=until), granularity="weight")
    units = recipe.granularity.units(model, torch.zeros(1, 6), Scope())
    run = Run(recipe, units, sc.Budget(sparsity=1 / 3), cost_of("sparsity"))
    units.keep({"weight": torch.tensor([[True] * 4 + [False] * 2])})
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.state[model.weight]["momentum_buffer"] = torch.arange(1.0, 7.0)[None]
    return model, units, run.hooks, TrainingState(model, sgd, step=0, last_step=8)


def test_the_smallest_leave_and_the_largest_growth_comes_at_zero_without_momentum():
    model, units, hooks, state = started()
    hooks.exchange(state, {"weight": torch.tensor([[9.0, 0.0, 9.0, 1.0, 2.0, 0.5]])})
    # alpha_0 = 0.5: two of four leave (0.1 and 0.2); 0.2 comes back as it was, the fifth comes anew
    assert units.masks["weight"].tolist() == [[True, False, True, True, True, False]]
    torch.testing.assert_close(model.weight.data, torch.tensor([[4.0, 0.0, 3.0, 0.2, 0.0, 0.0]]))
    assert state.optimizer.state[model.weight]["momentum_buffer"].tolist() == [[1, 2, 3, 4, 0, 6]]


def test_the_share_falls_with_a_cosine_and_then_the_mask_stays():
    shares = []
    for step in (0, 4, 8):
        _, units, hooks, state = started(drop=0.5)
        state.step = step
        before = units.masks["weight"].clone()
        hooks.exchange(state, {"weight": torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0, 1.0]])})
        shares.append(int((units.masks["weight"] & ~before).sum()))
    assert shares == [2, 1, 0]  # of four: 0.5, 0.25, 0
    _, _, hooks, state = started(updates=2, until=0.5)
    due = []
    for state.step in range(9):
        due.append(hooks.due(state))
    assert [step for step, is_due in enumerate(due) if is_due] == [2, 4]


def test_zero_weights_that_are_active_are_not_mistaken_for_masked_ones():
    model, units, hooks, state = started(drop=0.25)
    with torch.no_grad():
        model.weight[0, :4] = 0
    hooks.exchange(state, {"weight": torch.zeros(1, 6)})
    assert int(units.masks["weight"].sum()) == 4 and units.masks["weight"][0, :3].all()


def test_physical_cuts_cannot_be_undone():
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="choose granularity='weight'"):
        sc.prune(model, x, method="rigl", granularity="channel", budget=sc.Budget(macs=0.5))
