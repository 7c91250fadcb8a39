"""Closed forms of mean-field theory, and real wide networks beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from secateur.errors import NotApplicable
from secateur.parts.mean_field import (
    chi,
    edge_of_chaos,
    edge_with_variance,
    layer_densities,
    mean_square,
    next_variance,
    variance_at_edge,
)


def test_expectations_are_exact_for_polynomials():
    assert mean_square(lambda x: x, 2.5) == pytest.approx(2.5, rel=1e-12)
    assert mean_square(np.square, 2.0) == pytest.approx(12.0, rel=1e-12)


@pytest.mark.parametrize(
    ("sigma_b", "sigma_w", "q"), [(0.05, 1.1225, 0.1537), (0.1, 1.1934, 0.2733), (0.5, 1.5497, 1.3179)]
)
def test_the_edge_of_tanh(sigma_b, sigma_w, q):
    found = variance_at_edge("tanh", sigma_b)
    assert (edge_of_chaos("tanh", sigma_b), found) == (pytest.approx(sigma_w, abs=1e-4), pytest.approx(q, abs=1e-4))
    assert edge_with_variance("tanh", found)[0] == pytest.approx(sigma_b, abs=1e-6)


def test_the_edge_of_relu_is_one_point():
    for q in (0.1, 1.0, 7.0):
        assert edge_with_variance("relu", q) == (pytest.approx(0.0, abs=1e-6), pytest.approx(math.sqrt(2), rel=1e-9))
    with pytest.raises(NotApplicable, match="any variance stays"):
        variance_at_edge("relu", 0.1)


def test_the_edge_for_relu_is_a_point_and_for_tanh_a_curve():
    assert edge_of_chaos("relu") == math.sqrt(2)
    assert chi("relu", math.sqrt(2), 3.7) == pytest.approx(1) and next_variance("relu", math.sqrt(2), 0, 3.7) == (
        pytest.approx(3.7)
    )
    assert edge_of_chaos("tanh") == 1
    for sigma_b, sigma_w, q in ((0.05, 1.1225, 0.1537), (0.2, 1.3041, 0.5121), (0.5, 1.5497, 1.3179)):
        assert edge_of_chaos("tanh", sigma_b) == pytest.approx(sigma_w, abs=1e-4)
        assert next_variance("tanh", sigma_w, sigma_b, q) == pytest.approx(q, rel=1e-3)
        assert chi("tanh", sigma_w, q) == pytest.approx(1, abs=1e-3)


def test_equal_layers_get_equal_densities_and_the_total_is_met():
    assert layer_densities([5, 5, 5], [2, 2, 2], 0.1) == pytest.approx([0.1] * 3)
    sizes, scales = [100, 400, 50], [1.0, 0.2, 0.05]
    found = layer_densities(sizes, scales, 0.2)
    assert np.dot(found, sizes) == pytest.approx(0.2 * sum(sizes)) and found == sorted(found, reverse=True)


def test_the_tail_is_that_of_a_product_of_two_normal_variables():
    torch.manual_seed(0)
    products = (torch.randn(200_000) * torch.randn(200_000)).abs()
    first, second = layer_densities([1, 1], [1.0, 0.5], 0.1)
    threshold = products.quantile(1 - first)
    assert float((products > 2 * threshold).float().mean()) == pytest.approx(second, abs=0.003)


def sensitivity_densities(sigma_w, sigma_b, depth, density, width=300, seeds=2):
    """The share of each layer that sensitivity-based pruning keeps of real tanh networks."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        weights = [(torch.randn(width, width) * sigma_w / width**0.5).requires_grad_() for _ in range(depth)]
        x = torch.randn(64, width)
        for weight in weights:
            x = torch.tanh(x @ weight.T + sigma_b * torch.randn(width))
        loss = F.cross_entropy(x @ torch.randn(width, 10) / width**0.5, torch.randint(0, 10, (64,)))
        scores = [(w * g).abs().detach() for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True)]
        flat = torch.cat([values.flatten() for values in scores])
        threshold = flat.kthvalue(int((1 - density) * flat.numel())).values
        found.append([float((values > threshold).float().mean()) for values in scores])
    return np.mean(found, 0)


def test_in_the_ordered_phase_sensitivity_empties_the_first_layers_as_the_closed_form_says():
    depth, sigma_w, sigma_b, q = 12, 0.8, 0.3, 1.0
    for _ in range(100):
        q = next_variance("tanh", sigma_w, sigma_b, q)
    factor = chi("tanh", sigma_w, q)
    expected = layer_densities([1] * depth, [factor ** ((depth - layer) / 2) for layer in range(1, depth + 1)], 0.1)
    found = sensitivity_densities(sigma_w, sigma_b, depth, 0.1)
    assert max(found[:4]) < 0.01 and max(expected[:4]) < 0.01
    assert np.corrcoef(found, expected)[0, 1] > 0.98
    on_edge = sensitivity_densities(edge_of_chaos("tanh", sigma_b), sigma_b, depth, 0.1)
    assert on_edge.min() > 0.07 and on_edge.max() < 0.14
