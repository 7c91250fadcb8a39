"""RigL: the smallest weights leave, and those come whose gradient is largest.

Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery: Making All Tickets Winners, ICML 2020, algorithm 1. Written from
the paper; google-research/rigl was consulted for hyperparameters and departures.
"""

from __future__ import annotations

import torch

from secateur.core.engine import Run
from secateur.core.hooks import TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.parts.allocation.erdos_renyi import ERK
from secateur.parts.prune_and_grow import Exchange, PruneAndGrow


class RigL(PruneAndGrow):
    """A random mask that grows where the gradient is largest, the masked entries' gradients included."""

    name = "rigl"

    def hooks(self, run: Run) -> Exchange:
        """Return what exchanges weights after the cut."""
        return _GradientGrowth(run, self)


class _GradientGrowth(Exchange):
    def after_backward(self, state: TrainingState) -> None:
        if not self.due(state):
            return
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.units.parameters().items()
        }
        self.exchange(state, {name: gradient.abs() for name, gradient in gradients.items()})
        for parameter in state.model.parameters():  # the exchange takes the place of this gradient step
            parameter.grad = None


METHOD = Method("rigl", Recipe(criterion=RigL(), mask_from="init", weights_from="init", allocation=ERK()))
