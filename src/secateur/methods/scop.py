"""SCOP: a unit is worth what it does better than its knockoff, a control that knows nothing of the label.

Tang, Wang, Xu, Tao, Xu, Xu, Xu: SCOP: Scientific Control for Reliable Neural Network Pruning, NeurIPS 2020. The
knockoffs are the second-order ones of Candes, Fan, Janson, Lv: Panning for Gold, 2018, section 3.4.2.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.batches import batch_size, split_batch
from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.errors import NotApplicable
from secateur.parts.gates import Gates
from secateur.parts.scales import mean_scales


class Scop(Criterion):
    """|gamma| kappa, kappa = 2 beta - 1 in [-1, 1]: how far beta * unit + (1 - beta) * knockoff prefers the unit.

    gamma is the unit's scale in batch normalization; where it has none, the L2 norm of its weights.

    Attributes:
        epochs: Passes over the data in which the betas are trained, with all weights frozen.
        lr: Of Adam with momenta (0.5, 0.9).
    """

    name = "scop"
    epochs: int = Field(20, ge=1)
    lr: float = Field(0.004, gt=0)

    def score(self, context: Context) -> Scores:
        """Return the importance of each unit; `epochs` + 1 passes over the data."""
        squares = context.sum_over_units({name: weight.square() for name, weight in context.weights.items()})
        sizes = {group: square.sqrt() for group, square in squares.items()} | mean_scales(context.units)
        return {group: sizes[group] * kappa.to(sizes[group]) for group, kappa in self.kappas(context).items()}

    def kappas(self, context: Context) -> Scores:
        """Return 2 beta - 1 for each unit, after the training of the betas."""
        gates = Gates(context.units)
        knockoffs = Knockoffs(torch.cat([_images(batch) for batch in context.batches()]))
        device = next(context.model.parameters()).device
        betas = {group: torch.full(shape, 0.5, device=device) for group, shape in context.units.shapes.items()}
        for beta in betas.values():
            beta.requires_grad_(True)
        adam = torch.optim.Adam(betas.values(), lr=self.lr, betas=(0.5, 0.9))
        for _ in range(self.epochs):
            for batch in context.batches():
                controls = knockoffs.draw(_images(batch), context.generator)
                with context.undisturbed(), gates.mixed(betas, partial(context.forward, controls)):
                    found = torch.autograd.grad(context.loss_of(batch), list(betas.values()), materialize_grads=True)
                slopes = context.mean_over_processes(dict(zip(betas, found, strict=True)), batch_size(batch))
                for group, beta in betas.items():
                    beta.grad = slopes[group]
                adam.step()
                for beta in betas.values():
                    beta.data.clamp_(0, 1)
        return {group: 2 * beta.detach() - 1 for group, beta in betas.items()}


class Knockoffs:
    """Second-order Gaussian knockoffs of images, in the coordinates of their principal components.

    With s the diagonal of D, X~ = X - (X - mu) S^-1 D + chol(2 D - D S^-1 D) e has the covariance S of X, and the
    covariance S - D with X. Principal components are uncorrelated, so the largest s that is allowed,
    min(1, 2 lambda_min) of their correlations, is 1: D = S, and X~ = mu + S^(1/2) e, which owes nothing to its image.

    Args:
        images: Shape (n, ...).
    """

    def __init__(self, images: Tensor) -> None:
        flat = images.flatten(1)
        self._mean = flat.mean(0)
        triangle: Tensor = torch.linalg.qr(flat - self._mean, mode="r").R
        self._root = triangle / math.sqrt(max(1, len(flat) - 1))  # root^T root = S

    def draw(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return as many knockoffs as there are images, of their shape."""
        noise = torch.randn(len(images), len(self._root), generator=generator).to(images)
        return (self._mean + noise @ self._root).view(images.shape)


def _images(batch: Any) -> Tensor:
    args, kwargs, _ = split_batch(batch)
    images = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise NotApplicable(
            "Knockoffs are drawn for inputs that are one tensor of real numbers each (images); this batch has others. "
            "Use a criterion that needs no knockoffs, for example 'taylor'."
        )
    return images


METHOD = Method("scop", Recipe(criterion=Scop(), allocation="uniform"))
