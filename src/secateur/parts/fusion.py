"""Layer fusion: the one affine layer that stands in for two neighbors and everything between them.

Ghods, Lan, Goldstein, Studer: MSE-Optimal Neural Network Initialization via Layer Fusion, CISS 2020 (arXiv 2001.10509).
With a0 the input of the first layer, a1 that of the second and z2 = W2 a1 + b2, the fused layer minimizes
E|W a0 + b - z2|². The nonlinearity in between does not matter: two moments of (a0, a1) say everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from secateur.parts.least_squares import Moments, regression

NODES = 64
"""Of Gauss-Hermite quadrature."""

Activation = Callable[[Tensor], Tensor]


class Fused(NamedTuple):
    """An affine layer in the place of two.

    Attributes:
        weight: Shape (groups, outputs, inputs); the inputs of convolutions are patches.
        bias: Shape (groups, outputs); None if there is none.
        error: E|W a0 + b - z2|².
        power: The variance of z2, or E|z2|² without bias.
    """

    weight: Tensor
    bias: Tensor | None
    error: float
    power: float

    @property
    def relative_error(self) -> float:
        """The error relative to the power, in [0, 1]; 0 where there is no power."""
        return self.error / self.power if self.power > 0 else 0.0


def fused(
    joint: Moments,
    weight: Tensor,
    bias: Tensor | None,
    ridge: float = 1e-6,
    toward: Tensor | None = None,
) -> Fused:
    """Return the best affine map from what the first layer reads to what the second one computes.

        W = W2 Cov(a1, a0) (Cov(a0, a0) + e I)^-1        b = b2 + W2 E[a1] - W E[a0]

    Without bias, moments about zero take the place of covariances.

    Args:
        joint: Moments of (a0, a1). For convolutions a0 are patches, at the positions of a1.
        weight: W2, shape (groups, outputs, size of a1).
        bias: b2, shape (groups, outputs), or None.
        ridge: e, relative to the mean variance of a0.
        toward: The weight to which the ridge pulls, shape (groups, outputs, size of a0); default: 0.
    """
    inputs = joint.mean.shape[-1] - weight.shape[-1]
    first, second = slice(inputs), slice(inputs, None)
    spread = joint.second if bias is None else joint.covariance
    weight = weight.double()
    target = weight @ spread[:, second]  # Cov(z2, (a0, a1))
    pull = torch.zeros_like(target[..., first]) if toward is None else toward.double()
    new = pull + regression(target[..., first] - pull @ spread[:, first, first], spread[:, first, first], ridge)
    power = (target[..., second] * weight).sum()
    error = power - 2 * (target[..., first] * new).sum() + (new @ spread[:, first, first] * new).sum()
    if bias is not None:
        mean = joint.mean[..., None]
        bias = bias.double() + (weight @ mean[:, second] - new @ mean[:, first])[..., 0]
    return Fused(new, bias, max(0.0, float(error)), float(power))


def fused_gaussian(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    mean: Tensor,
    covariance: Tensor,
    activation: Activation = torch.relu,
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the best affine map if a0 is Gaussian, without any data.

    By Stein's lemma Cov(a1, a0) = diag(g) W1 Cov(a0, a0) with g_i = E[act'(z1_i)], so that the covariance cancels:

        W = W2 diag(g) W1        b = b2 + W2 E[act(z1)] - W E[a0]

    Args:
        first: W1 of shape (hidden, inputs) and b1 of shape (hidden,).
        second: W2 of shape (outputs, hidden) and b2 of shape (outputs,).
        mean: E[a0], shape (inputs,).
        covariance: Cov(a0, a0), shape (inputs, inputs).
        activation: Elementwise.
    """
    (w1, b1), (w2, b2) = ([t.detach().double() for t in pair] for pair in (first, second))
    mean, covariance = mean.double(), covariance.double()
    center = w1 @ mean + b1
    spread = (w1 @ covariance * w1).sum(1).clamp_min(0).sqrt()
    value, gain = gaussian_moments(center, spread, activation)
    weight = w2 * gain @ w1
    return weight, b2 + w2 @ value - weight @ mean


def gaussian_moments(mean: Tensor, spread: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """Return E[act(z)] and E[act'(z)] for z ~ N(mean, spread²), elementwise: exact for ReLU, else by quadrature."""
    safe = spread.clamp_min(1e-150)
    if activation in (torch.relu, torch.nn.functional.relu):
        ratio = mean / safe
        below = torch.special.ndtr(ratio)
        return mean * below + spread * torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi), below
    nodes, weights = (torch.from_numpy(values) for values in hermegauss(NODES))
    values = activation(mean[..., None] + spread[..., None] * nodes) * weights / math.sqrt(2 * math.pi)
    # Stein: E[act'(z)] = E[act(z) (z - mean)] / spread²; for a spread of zero the slope at the mean
    slope = (values * nodes).sum(-1) / safe
    point = mean.detach().clone().requires_grad_()
    with torch.enable_grad():
        (at_mean,) = torch.autograd.grad(activation(point).sum(), point)
    return values.sum(-1), torch.where(spread > 1e-12, slope, at_mean)
