"""Least squares from streamed moments: the one solver that repairs, fusion and reconstruction share.

The best affine map from x to y, which minimizes E|A x + b - y|², needs nothing but the first and second moments of
(x, y), whatever lies between the two:

    A = Cov(y, x) (Cov(x, x) + e I)^-1        b = E[y] - A E[x]
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.context import Context
from secateur.core.layers import holders, input_rows


class Moments:
    """Mean and covariance of vectors that come in batches, in float64 (Chan, Golub & LeVeque 1979, eq. 2.1).

    Each batch is centered on its own before it is added, so that large means cost no precision.

    Attributes:
        count: Number of vectors so far.
        mean: Shape (groups, size).
        covariance: Shape (groups, size, size).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.covariance = torch.zeros(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in vectors of shape (groups, vectors, size)."""
        rows = rows.double()
        mean = rows.mean(1)
        centered = rows - mean[:, None]
        self._merge(rows.shape[1], mean, centered.transpose(1, 2) @ centered / rows.shape[1])

    def _merge(self, n: int, mean: Tensor, covariance: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.covariance = n, mean, covariance
            return
        share = n / (self.count + n)
        step = mean - self.mean
        between = share * (1 - share) * step[:, :, None] * step[:, None, :]
        self.covariance = (1 - share) * self.covariance + share * covariance + between
        self.mean = self.mean + share * step
        self.count += n

    @property
    def second(self) -> Tensor:
        """E[x xᵀ], not centered, of shape (groups, size, size)."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    def over_processes(self, context: Context) -> None:
        """Take in what all other processes have seen, too."""
        means = context.mean_over_processes({"mean": self.mean.clone(), "second": self.second}, self.count)
        self.mean = means["mean"]
        self.covariance = means["second"] - self.mean[:, :, None] * self.mean[:, None, :]


def input_moments(context: Context, weights: Iterable[str]) -> dict[str, Moments]:
    """Return the moments of what weights meet, by name, in one pass over the data; those that never run are left out.

    Args:
        context: Gives the data.
        weights: Names of weights of linear or two-dimensional convolutional layers of its model; what several layers
            with the same weight read counts together.
    """
    found: dict[str, Moments] = {}

    def listener(name: str) -> Any:
        def listen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            found.setdefault(name, Moments()).add(input_rows(module, inputs[0]))

        return listen

    with ExitStack() as stack:
        for name in weights:
            for layer in holders(context.model, name):
                stack.callback(layer.register_forward_pre_hook(listener(name)).remove)
        for batch in context.batches():
            with context.undisturbed(), torch.inference_mode():
                context.forward(batch)
    for moments in found.values():
        moments.over_processes(context)
    return found


def regression(cross: Tensor, covariance: Tensor, ridge: float) -> Tensor:
    """Return the matrix A that minimizes E|A x - y|² + e |A|², e = `ridge` times the mean variance of x.

    Directions in which x does not vary at all take no part (the pseudoinverse), so `ridge` may be 0.

    Args:
        cross: Cov(y, x) of shape (..., outputs, inputs).
        covariance: Cov(x, x) of shape (..., inputs, inputs).
        ridge: Relative to the mean of the diagonal of `covariance`.

    Returns:
        Shape (..., outputs, inputs).
    """
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    regular = covariance + ridge * scale * torch.eye(covariance.shape[-1], dtype=covariance.dtype).to(covariance)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if ridge > 0 and not failed.any():
        inverse_applied: Tensor = torch.cholesky_solve(cross.mT, factor)
        return inverse_applied.mT
    inverse: Tensor = torch.linalg.pinv(regular, hermitian=True)
    return cross @ inverse
