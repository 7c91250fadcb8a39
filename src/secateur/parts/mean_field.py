"""Mean-field theory of wide random networks: how signals and gradients travel through layers.

With ``y = W phi(x) + b``, W ~ N(0, sigma_w²/N) and b ~ N(0, sigma_b²), the variance q of a unit becomes
``sigma_b² + sigma_w² E[phi(sqrt(q) Z)²]`` from one layer to the next, and the squared gradient changes by the factor
``chi = sigma_w² E[phi'(sqrt(q) Z)²]``. At the edge of chaos chi is 1 (Hayou, Ton, Doucet, Teh, arXiv 2002.08797).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import iti0k0

from secateur.errors import NotApplicable

Activation = Literal["relu", "tanh"]
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(200)
_Function = Callable[[np.ndarray], np.ndarray]

FUNCTIONS: dict[Activation, tuple[_Function, _Function]] = {
    "relu": (lambda x: np.maximum(x, 0), lambda x: (x > 0).astype(float)),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
}
"""Activations with their derivatives."""


def mean_square(function: _Function, q: float) -> float:
    """Return E[f(sqrt(q) Z)²] for a standard normal Z, by Gauss-Hermite quadrature."""
    return float((_WEIGHTS * function(np.sqrt(q) * _NODES) ** 2).sum() / _WEIGHTS.sum())


def next_variance(activation: Activation, sigma_w: float, sigma_b: float, q: float) -> float:
    """Return the variance of the units of the next layer."""
    return sigma_b**2 + sigma_w**2 * mean_square(FUNCTIONS[activation][0], q)


def chi(activation: Activation, sigma_w: float, q: float) -> float:
    """Return the factor by which the squared gradient grows from one layer to the layer before."""
    return sigma_w**2 * mean_square(FUNCTIONS[activation][1], q)


def edge_with_variance(activation: Activation, q: float) -> tuple[float, float]:
    """Return (sigma_b, sigma_w) on the edge of chaos at which the variance stays at q.

    chi = 1 gives sigma_w, and the fixed point of the variance then gives sigma_b.
    """
    function, slope = FUNCTIONS[activation]
    sigma_w = mean_square(slope, q) ** -0.5
    bias = q - sigma_w**2 * mean_square(function, q)
    return math.sqrt(max(bias, 0.0)), sigma_w


def variance_at_edge(activation: Activation, sigma_b: float) -> float:
    """Return the variance that stays as it is on the edge of chaos, for a given sigma_b > 0.

    Raises:
        NotApplicable: For ReLU, whose edge is the single point sigma_b = 0, where every variance stays.
    """
    if activation == "relu":
        raise NotApplicable(
            "The edge of chaos of ReLU is the point sigma_b = 0, where any variance stays; take 'tanh'."
        )
    return float(brentq(lambda q: edge_with_variance(activation, q)[0] - sigma_b, 1e-6, 30.0))


def edge_of_chaos(activation: Activation, sigma_b: float = 0.0) -> float:
    """Return the sigma_w at which signals and gradients neither die out nor explode.

    For ReLU the edge is a single point, sigma_b = 0 and sigma_w = sqrt(2). For tanh it is a curve.
    """
    if activation == "relu":
        return math.sqrt(2)
    return edge_with_variance(activation, variance_at_edge(activation, sigma_b))[1] if sigma_b else 1.0


def layer_densities(sizes: Sequence[int], scales: Sequence[float], density: float) -> list[float]:
    """Return the share of each layer that sensitivity-based pruning keeps of a wide random network.

    A score |theta g| is the size of a product of two independent normal variables, so a layer whose scores have the
    scale s keeps P(|Z1 Z2| > t / s) at the threshold t that all layers share.

    Args:
        sizes: Weights of each layer.
        scales: sd(theta) sd(g) of each layer; only their ratios matter. Off the edge of chaos, if the variance of the
            signals is constant: chi^((L - l) / 2) for the layer l of L.
        density: The share of all weights that is kept, in (0, 1).
    """
    n, s = np.asarray(sizes, dtype=float), np.asarray(scales, dtype=float) / max(scales)

    def kept(log_t: float) -> np.ndarray:
        return np.asarray(_tail(np.exp(log_t) / s))

    log_t = brentq(lambda log_t: (n * kept(log_t)).sum() - density * n.sum(), -60.0, 5.0)
    return [float(share) for share in kept(log_t)]


def _tail(t: np.ndarray) -> np.ndarray:
    """Return P(|Z1 Z2| > t); the density of the product is K0(|x|) / pi."""
    below: np.ndarray = iti0k0(np.minimum(t, 600.0))[1]
    return np.clip(1 - 2 / np.pi * below, 0.0, 1.0)
