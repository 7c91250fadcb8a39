"""Taylor importance: the squared change of the loss when a unit is removed, to first or second order, or exactly.

Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for Neural Network Pruning, CVPR 2019, eqs. 3 and 6 to 9.
Written from the paper; its reference code (NVlabs/Taylor_pruning) was consulted for hyperparameters and departures.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import model_validator

from secateur.core.context import Context, Values
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.errors import InvalidRecipe
from secateur.parts.allocation.ranking import Global
from secateur.parts.gates import ablations, gate_curvature


class Taylor(Criterion):
    """The mean over mini-batches of the squared change of the loss when a unit is removed.

    Attributes:
        at: ``gate``: one factor z = 1 where the unit is consumed, I = (dL/dz)² = (sum of w g)². ``weight``: every
            weight of the unit on its own, I = sum of (w g)². For single weights the two are the same.
        order: 2 adds the curvature: I = (dL/dz - d²L/dz² / 2)² at gates, (w g - w (H w) / 2)² at weights. ``exact`` is
            the oracle, I = (L - L without the unit)²: each unit is removed alone, by a gate of 0.
    """

    name = "taylor"
    at: Literal["gate", "weight"] = "gate"
    order: Literal[1, 2, "exact"] = 1

    @model_validator(mode="after")
    def _units_are_removed_whole(self) -> Self:
        if self.order == "exact" and self.at == "weight":
            raise InvalidRecipe("the exact change of the loss is taken at gates; got at='weight'")
        return self

    def score(self, context: Context) -> Scores:
        """Return the importance of each unit; one pass over the data."""
        total: Scores = {}
        batches = 0
        for importance in self._of_batches(context):
            total = importance if not total else {g: total[g] + i for g, i in importance.items()}
            batches += 1
        return {g: i / batches for g, i in total.items()}

    def _of_batches(self, context: Context) -> Iterator[Scores]:
        """Yield the importance of each unit on each batch."""
        single_weights = context.units.shapes == {name: weight.shape for name, weight in context.weights.items()}
        if self.order == "exact":
            for change in ablations(context):
                yield {g: c.square() for g, c in change.items()}
        elif self.order == 2 and self.at == "gate" and not single_weights:
            for slope, curvature in gate_curvature(context):
                yield {g: (slope[g] - curvature[g] / 2).square() for g in slope}
        else:
            for change in self._of_weights(context):
                if self.at == "gate":
                    yield {g: c.square() for g, c in context.sum_over_units(change, consumed=True).items()}
                else:
                    yield context.sum_over_units({name: c.square() for name, c in change.items()})

    def _of_weights(self, context: Context) -> Iterator[Values]:
        """Yield, for each batch, by how much the loss would fall if a weight alone were removed."""
        weights = context.weights
        if self.order == 1:
            for gradients in context.gradient_batches():
                yield dict(
                    zip(weights, torch._foreach_mul(list(weights.values()), list(gradients.values())), strict=True)
                )
        else:
            for gradients, product in context.curvature_batches(weights):
                yield {name: w * (gradients[name] - product[name] / 2) for name, w in weights.items()}


METHOD = Method("taylor", Recipe(criterion=Taylor(), allocation=Global()), {"allocation": Global(normalize="mean")})
