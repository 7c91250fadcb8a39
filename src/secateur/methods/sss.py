"""Sparse structure selection: factors on units, trained with an L1 penalty by accelerated proximal gradient steps.

Huang, Wang: Data-Driven Sparse Structure Selection for Deep Neural Networks, ECCV 2018, eqs. 10 to 12. Written from the
paper; its reference code (TuSimple/sparse-structure-selection) was consulted for hyperparameters and departures.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.parts.gates import Gates


class SparseStructureSelection(Criterion):
    """|lambda|, the size of a factor on the unit that is trained along with the weights.

    Attributes:
        penalty: Of the sum of |lambda| in the loss.
        momentum: Of the accelerated steps.
    """

    name = "sss"
    learns = True
    penalty: float = Field(0.01, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)

    def hooks(self, run: Run) -> Factors:
        """Return the factors, and their training."""
        return Factors(run, self.penalty, self.momentum)

    def score(self, context: Context) -> Scores:
        """Return |lambda| as it was when training stopped."""
        assert isinstance(context.learned, Factors)
        return {group: factor.detach().abs() for group, factor in context.learned.factors.items()}


class Factors(Hooks):
    """One factor for each unit where it is consumed, 1 at the start of a stretch of training that leads to a cut.

    At its end the factors go into the weights that they multiply, so that the network computes the same without them.
    """

    def __init__(self, run: Run, penalty: float, momentum: float) -> None:
        Gates(run.units)  # refuses the network before it is trained
        self.factors: Scores = {}
        self._run, self._penalty, self._momentum = run, penalty, momentum
        self._velocity: Scores = {}
        self._applied: ExitStack | None = None

    def on_start(self, state: TrainingState) -> None:
        """Put factors of 1 in front of what reads the units, if a cut is to come."""
        if self._run.next_level is None:
            return
        units = self._run.units
        device = next(units.model.parameters()).device
        self.factors = {g: torch.ones(s, device=device, requires_grad=True) for g, s in units.shapes.items()}
        self._velocity = {group: torch.zeros_like(factor) for group, factor in self.factors.items()}
        self._applied = ExitStack()
        self._applied.enter_context(Gates(units).applied(self.factors))

    def after_backward(self, state: TrainingState) -> None:
        """Move the factors."""
        if self._applied is None:
            return
        lr = state.optimizer.param_groups[0]["lr"]
        for group, factor in self.factors.items():
            if factor.grad is not None:
                proximal_step(factor, self._velocity[group], factor.grad, lr, self._penalty, self._momentum)
                factor.grad = None

    def on_end(self, state: TrainingState) -> None:
        """Multiply the factors into the weights."""
        if self._applied is None:
            return
        self._applied.close()
        self._applied = None
        Gates(self._run.units).fold(self.factors)

    def state_dict(self) -> dict[str, Any]:
        """Return the factors and their velocities."""
        factors = {group: factor.detach() for group, factor in self.factors.items()}
        return {"factors": factors, "velocity": dict(self._velocity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these factors."""
        with torch.no_grad():
            for group, factor in self.factors.items():
                factor.copy_(state["factors"][group])
                self._velocity[group].copy_(state["velocity"][group])


@torch.no_grad()
def proximal_step(factor: Tensor, velocity: Tensor, slope: Tensor, lr: float, penalty: float, momentum: float) -> None:
    """One accelerated proximal gradient step on loss + penalty * |factor|, on the momentum form of the iterates.

    z = factor - lr * slope, s = soft(z, lr * penalty), velocity = s - factor + momentum * velocity, and
    factor = s + momentum * velocity, where soft(z, t) = sign(z) max(|z| - t, 0). Mutates `factor` and `velocity`.
    """
    z = factor - lr * slope
    shrunk = z.sign() * (z.abs() - lr * penalty).clamp_min(0)
    velocity.mul_(momentum).add_(shrunk - factor)
    factor.copy_(shrunk + momentum * velocity)


METHOD = Method("sss", Recipe(criterion=SparseStructureSelection(), schedule=OneShot(at=0.5)))
