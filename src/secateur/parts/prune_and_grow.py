"""Prune and grow: a mask that changes in training, with exactly as many weights of each tensor at all times."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.select import top_k
from secateur.core.slots import Criterion
from secateur.core.units import Kept, Scores
from secateur.errors import NotApplicable
from secateur.parts.granularity.weight import WeightUnits


class PruneAndGrow(Criterion):
    """A random mask, some of whose weights change places in training: the smallest ones leave, others come.

    At step t of the training after the cut the share drop/2 (1 + cos(pi t / T)) of each tensor's weights changes
    (Evci et al., RigL, ICML 2020, section 3).

    Attributes:
        drop: Share of a tensor's weights that changes at first, in (0, 1).
        updates: How many times weights change, evenly spaced.
        until: T, the share of the training after which the mask stays, in (0, 1].
    """

    works_in_training: ClassVar[bool] = True
    drop: float = Field(0.3, gt=0, lt=1)
    updates: int = Field(20, ge=1)
    until: float = Field(0.75, gt=0, le=1)

    def score(self, context: Context) -> Scores:
        """Return random scores; where weights are masked already, the magnitudes of the others."""
        if context.units.removed():
            return {name: weight.abs() for name, weight in context.weights.items()}
        return {g: torch.rand(shape, generator=context.generator) for g, shape in context.units.shapes.items()}


class Exchange(Hooks):
    """Exchanges weights; what grows is for the method to say.

    Args:
        run: Its masks change, in place.
        settings: How much and when.

    Raises:
        NotApplicable: The units are not single weights.
    """

    def __init__(self, run: Run, settings: PruneAndGrow) -> None:
        if not isinstance(run.units, WeightUnits):
            raise NotApplicable(
                f"{settings.name!r} lets weights go and come back, which physical cuts cannot undo: choose "
                "granularity='weight'."
            )
        self.run, self.units, self.settings = run, run.units, settings

    def due(self, state: TrainingState) -> bool:
        """Return whether weights change at this step."""
        done, total = state.step - state.first_step, state.last_step - state.first_step
        every = max(1, round(self.settings.until * total / self.settings.updates))
        return bool(self.units.masks) and 0 < done <= self.settings.until * total and done % every == 0

    @torch.no_grad()
    def exchange(self, state: TrainingState, growth: Mapping[str, Tensor]) -> None:
        """Drop the smallest weights of each tensor and grow as many; mutates masks, weights and the optimizer's state.

        What grows is chosen among all that is not kept, also what was dropped just now, which then goes on as it was.
        Weights that are new start at zero, without momentum.

        Args:
            state: The present step.
            growth: By tensor, how much each entry deserves to grow.
        """
        t = (state.step - state.first_step) / (self.settings.until * (state.last_step - state.first_step))
        share = self.settings.drop / 2 * (1 + math.cos(math.pi * t))
        after: Kept = {}
        for name, weight in self.units.parameters().items():
            active = self.units.masks[name]
            n = int(active.sum())
            kept = _best(weight.abs().masked_fill(~active, -torch.inf), n - int(share * n))
            after[name] = kept | _best(growth[name].to(weight.device).masked_fill(kept, -torch.inf), int(share * n))
            _forget(state.optimizer, weight, after[name] & ~active)
        self.units.exchange(after)


def _best(scores: Tensor, count: int) -> Tensor:
    return top_k({"": scores}, count)[""]


def _forget(optimizer: Optimizer, parameter: Tensor, entries: Tensor) -> None:
    """Zero what an optimizer remembers of these entries of a parameter."""
    for memory in optimizer.state.get(parameter, {}).values():
        if isinstance(memory, Tensor) and memory.shape == parameter.shape:
            memory[entries] = 0
