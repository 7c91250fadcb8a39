"""ThiNet: remove the channels whose absence changes the next layer's output least, one after another.

Luo, Wu, Lin: ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression, ICCV 2017, eqs. 5 and 6 and
algorithm 1. Written from the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.parts.allocation.ranking import Uniform
from secateur.parts.contributions import Contributions
from secateur.parts.readers import channel_units
from secateur.parts.repair.least_squares import LeastSquares


class ThiNet(Criterion):
    """The error of the next layer's output at which greedy removal takes a unit."""

    name = "thinet"

    def score(self, context: Context) -> Scores:
        """Return relative squared errors, rising in the order in which units leave; one pass over the data."""
        units = channel_units(context.units, "ThiNet")
        contributions = Contributions(context, units)
        return {axis: greedy(contributions.gram(axis)) for axis in units.shapes}


def greedy(gram: Tensor) -> Tensor:
    """Return, for each unit, the error when it has left: algorithm 1, in the order of the smallest error at each step.

    Args:
        gram: G of shape (n, n); removing the set T has the error of the sum of G over T x T.

    Returns:
        Shape (n,). Where removing a further unit lowers the error (contributions cancel), the score still rises, by as
        little as numbers allow: it says which unit leaves first.
    """
    scores = torch.empty(len(gram), dtype=torch.float64)
    growth = gram.diagonal().clone()  # of the error if a unit left now
    error, score = 0.0, -math.inf
    for _ in range(len(gram)):
        unit = int(growth.argmin())
        error += float(growth[unit])
        score = max(error, math.nextafter(score, math.inf))
        scores[unit] = score
        growth += 2 * gram[unit]
        growth[unit] = math.inf
    return scores


METHOD = Method(
    "thinet",
    Recipe(criterion=ThiNet(), granularity="channel", allocation=Uniform(), repair=LeastSquares()),
)
