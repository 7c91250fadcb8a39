"""Random pruning: the baseline that every criterion must beat."""

from __future__ import annotations

import torch

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores


class Random(Criterion):
    """Each unit's score is drawn from the uniform distribution on [0, 1)."""

    name = "random"
    weights_alone = True

    def score(self, context: Context) -> Scores:
        """Return independent uniform scores, controlled by the run's seed."""
        return {g: torch.rand(shape, generator=context.generator) for g, shape in context.units.shapes.items()}


METHOD = Method("random", Recipe(criterion=Random()))
