"""SET: sparse evolutionary training. The smallest weights leave, and as many come at random places.

Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta: Scalable Training of Artificial Neural Networks with Adaptive Sparse
Connectivity inspired by Network Science, Nature Communications 2018. Written from the paper; google-research/rigl was
consulted for hyperparameters and departures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from secateur.core.engine import Run
from secateur.core.hooks import TrainingState
from secateur.core.method import Method
from secateur.core.randomness import generator_for
from secateur.core.recipe import Recipe
from secateur.parts.allocation.erdos_renyi import ER
from secateur.parts.prune_and_grow import Exchange, PruneAndGrow


class SET(PruneAndGrow):
    """A random mask with random growth."""

    name = "set"

    def hooks(self, run: Run) -> Exchange:
        """Return what exchanges weights after the cut."""
        return _RandomGrowth(run, self)


class _RandomGrowth(Exchange):
    def __init__(self, run: Run, settings: SET) -> None:
        super().__init__(run, settings)
        self._generator = generator_for("growth", run.seed)

    def after_step(self, state: TrainingState) -> None:
        if self.due(state):
            growth = {g: torch.rand(shape, generator=self._generator) for g, shape in self.units.shapes.items()}
            self.exchange(state, growth)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"])


METHOD = Method("set", Recipe(criterion=SET(), mask_from="init", weights_from="init", allocation=ER()))
