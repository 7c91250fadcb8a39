"""SBP-SR: sensitivity-based pruning at the edge of chaos, rescaled, on stable residual networks.

Hayou, Ton, Doucet, Teh: Robust Pruning at Initialization, ICLR 2021 (arXiv 2002.08797). Deviations are on the card.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.parts.repair.rescale import Rescale, at_edge_of_chaos
from secateur.parts.sensitivity import sensitivity


class Sbp(Criterion):
    """The sensitivity |theta dL/dtheta| of the network that is initialized at the edge of chaos.

    A draw at the edge is a draw of any other scale times a number per layer, so the given weights are multiplied.

    Attributes:
        sigma_w: Scale of the weights at the edge: sqrt(2) for ReLU.
        stable: Divide residual branches by the root of their number (a stable ResNet).
    """

    name = "sbp"
    version: ClassVar[int] = 2
    sigma_w: float = Field(math.sqrt(2), gt=0)
    stable: bool = True

    def score(self, context: Context) -> Scores:
        """Return the sensitivity of each unit; one pass over the data."""
        edge = context.but(values=at_edge_of_chaos(context, self.sigma_w, stable=self.stable))
        return sensitivity(edge, edge.weights, edge.gradients())


METHOD = Method("sbp", Recipe(criterion=Sbp(), mask_from="init", weights_from="init", repair=Rescale(stable=True)))
