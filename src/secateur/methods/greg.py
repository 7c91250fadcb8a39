"""GReg: growing regularization. An L2 penalty on what will be cut grows until nothing is left to cut.

Wang, Qin, Zhang, Fu: Neural Pruning via Growing Regularization, ICLR 2021. Written from the paper; its
reference code (MingSun-Tse/Regularization-Pruning) was consulted for hyperparameters and departures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from secateur.core.context import Context, Values
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Scores, Units
from secateur.parts.allocation.ranking import Uniform


class GReg(Criterion):
    """The L1 norm of a unit at the moment of the picks; what was picked then is cut later.

    The penalty is 1/2 sum over units of lambda ||w_unit||², on top of the optimizer's weight decay.

    Attributes:
        variant: 1: the picks are made at the start (GReg-1). 2: the penalty first grows on all units, and the picks
            are made by what is left of them, which depends on the curvature of the loss (GReg-2).
        ceiling: Final lambda of what was picked.
        pick_ceiling: The lambda of all units at which GReg-2 picks.
        picking: Share of the growth that comes before the picks of GReg-2.
        stabilize: Final share of the training before the cut in which lambda stays.
    """

    name = "greg"
    learns = True
    variant: Literal[1, 2] = 1
    ceiling: float = Field(1.0, ge=0)
    pick_ceiling: float = Field(0.01, ge=0)
    picking: float = Field(0.1, gt=0, lt=1)
    stabilize: float = Field(0.4, ge=0, lt=1)

    def hooks(self, run: Run) -> Hooks:
        """Return what makes the penalty grow until the cut."""
        return _Growing(run, self)

    def score(self, context: Context) -> Scores:
        """Return the scores of the picks, so that the cut takes what was picked."""
        assert isinstance(context.learned, _Growing)
        return {group: values.clone() for group, values in context.learned.scores.items()}


class _Growing(Hooks):
    """Adds lambda w to the gradients of the picked units.

    Attributes:
        scores: Of the picks; empty before.
    """

    def __init__(self, run: Run, settings: GReg) -> None:
        self.run, self.settings = run, settings
        self.scores: Scores = {}
        self._times: Values = {}

    def on_start(self, state: TrainingState) -> None:
        self.scores, self._times = {}, {}
        if self.run.next_level is None:
            return
        if self.settings.variant == 1:
            self._pick(_l1_norms(self.run.units))
        else:
            self._penalize({g: torch.ones(shape) for g, shape in self.run.units.shapes.items()})

    @torch.no_grad()
    def after_backward(self, state: TrainingState) -> None:
        if self.run.next_level is None:
            return
        grown = state.progress / (1 - self.settings.stabilize)
        if not self.scores and grown >= self.settings.picking:
            self._pick(_l1_norms(self.run.units))
        live = {name: p for name, p in self.run.units.parameters().items() if p.grad is not None}
        gradients: list[Any] = [p.grad for p in live.values()]
        times = [self._times[name] for name in live]
        torch._foreach_addcmul_(gradients, list(live.values()), times, value=self.strength(grown))

    def on_end(self, state: TrainingState) -> None:
        if self.run.next_level is not None and not self.scores:  # so short a training that the picks never came
            self._pick(_l1_norms(self.run.units))

    def strength(self, grown: float) -> float:
        """Return lambda when the share `grown` of the growth is over."""
        s = self.settings
        if s.variant == 1:
            return s.ceiling * min(1.0, grown)
        if grown < s.picking:
            return s.pick_ceiling * grown / s.picking
        return s.pick_ceiling + (s.ceiling - s.pick_ceiling) * min(1.0, (grown - s.picking) / (1 - s.picking))

    def _pick(self, scores: Scores) -> None:
        level = self.run.next_level
        assert level is not None
        self.scores = scores
        self._penalize({group: ~kept for group, kept in self.run.choose(scores, level.keep).items()})

    def _penalize(self, units: Scores) -> None:
        """Penalize these units from now on; an entry of two of them is penalized twice."""
        self._times = self.run.units.spread(units)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["scores"] and self.run.next_level is not None:
            self._pick(dict(state["scores"]))


def _l1_norms(units: Units) -> Scores:
    return units.sum({name: p.detach().abs() for name, p in units.parameters().items()})


METHOD = Method("greg", Recipe(criterion=GReg(), allocation=Uniform(), schedule=OneShot(at=0.5)))
