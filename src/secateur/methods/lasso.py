"""Regression-based channel selection: the LASSO picks the channels that the next layer's output is made of.

He, Zhang, Sun: Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, eqs. 1 to 4. Written from the
paper.
"""

from __future__ import annotations

import warnings

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import lars_path_gram
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

STEPS_PER_UNIT = 8
"""Most steps of the path: each makes a coefficient nonzero, or zero again."""


class Lasso(Criterion):
    """The penalty up to which a channel's coefficient is not zero, relative to that at which all are."""

    name = "lasso"

    def score(self, context: Context) -> Scores:
        """Return penalties in [0, 1]; one pass over the data."""
        units = channel_units(context.units, "Channel selection by the LASSO")
        contributions = Contributions(context, units)
        return {axis: entries(contributions.gram(axis), contributions.norms(axis)) for axis in units.shapes}


def entries(gram: Tensor, norms: Tensor) -> Tensor:
    """Return at which share of the largest penalty each coefficient of the LASSO path becomes nonzero.

    The path minimizes E|sum of (1 - b_j / |W_j|) W_j x_j|² / 2 + penalty * sum of |b_j|: eq. 2 with its constraint
    |W_j| = 1. It is followed exactly, by least-angle regression.

    Args:
        gram: G_jk = E<W_j x_j, W_k x_k>, of shape (n, n).
        norms: |W_j|, of shape (n,).

    Returns:
        Shape (n,); 0 for coefficients that never are (dead units, and those that others express exactly).
    """
    alive = gram.diagonal() > 0
    scores = torch.zeros(len(gram), dtype=torch.float64)
    if not alive.any():
        return scores
    unit = norms[alive]
    normalized = gram[alive][:, alive] / unit[:, None] / unit[None, :]
    target = normalized @ unit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # units that others express exactly end the path early
        penalties, _, path = lars_path_gram(
            target.numpy(), normalized.numpy(), n_samples=1, method="lasso", max_iter=STEPS_PER_UNIT * len(unit)
        )
    nonzero = torch.from_numpy(path != 0)
    first = nonzero.int().argmax(1)  # the step that ends with it nonzero; it entered at the penalty before
    entered = torch.from_numpy(penalties)[(first - 1).clamp_min(0)] / penalties[0]
    scores[alive] = torch.where(nonzero.any(1), entered, 0.0)
    return scores


METHOD = Method(
    "lasso",
    Recipe(criterion=Lasso(), granularity="channel", allocation=Uniform(), repair=LeastSquares()),
)
