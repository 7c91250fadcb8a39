"""Taylor importance: the squared first-order change of the loss when a unit is removed.

Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for Neural Network Pruning, CVPR 2019, eqs. 8 and 9.
Written from the paper; its reference code (NVlabs/Taylor_pruning) was consulted for hyperparameters and departures.
"""

from __future__ import annotations

from typing import Literal

import torch

from secateur.core.context import Context, Values
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.parts.allocation.ranking import Global


class Taylor(Criterion):
    """The mean over mini-batches of the squared first-order change of the loss.

    Attributes:
        at: ``gate``: one factor z = 1 where the unit is consumed, I = (z dL/dz)² = (sum of w g)². ``weight``: every
            weight of the unit on its own, I = sum of (w g)². For single weights the two are the same.
    """

    name = "taylor"
    at: Literal["gate", "weight"] = "gate"

    def score(self, context: Context) -> Scores:
        """Return the importance of each unit; one pass over the data."""
        total: Scores = {}
        batches = 0
        for gradients in context.gradient_batches():
            importance = self._of_batch(context, gradients)
            total = importance if not total else {g: total[g] + i for g, i in importance.items()}
            batches += 1
        return {g: i / batches for g, i in total.items()}

    def _of_batch(self, context: Context, gradients: Values) -> Scores:
        weights = context.weights
        change = dict(zip(weights, torch._foreach_mul(list(weights.values()), list(gradients.values())), strict=True))
        if self.at == "gate":
            return {g: s.square() for g, s in context.sum_over_units(change, consumed=True).items()}
        return context.sum_over_units({name: c.square() for name, c in change.items()})


METHOD = Method("taylor", Recipe(criterion=Taylor(), allocation=Global(normalize="mean")))
