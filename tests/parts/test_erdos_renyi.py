"""Erdős-Rényi allocations against their formula, with its eps found by hand."""

from __future__ import annotations

from math import prod

import pytest
import torch

from secateur.core.select import top_k
from secateur.parts.allocation.erdos_renyi import ER, ERK

SHAPES = {"stem": (16, 3, 3, 3), "conv": (64, 32, 3, 3), "wide": (128, 64, 1, 1), "head": (10, 128)}


def formula(share, total):
    """Kept entries of each tensor: min(n, eps x share), eps by bisection."""
    sizes = {name: prod(shape) for name, shape in SHAPES.items()}
    low, high = 0.0, 1e6
    for _ in range(200):
        eps = (low + high) / 2
        kept = {name: min(sizes[name], eps * share(shape)) for name, shape in SHAPES.items()}
        low, high = (eps, high) if sum(kept.values()) < total else (low, eps)
    return kept


@pytest.mark.parametrize("density", [0.5, 0.2, 0.02])
@pytest.mark.parametrize(
    ("allocation", "share"), [(ERK(), sum), (ER(), lambda s: (s[0] + s[1]) * prod(s[2:]))], ids=["erk", "er"]
)
def test_each_tensor_keeps_what_the_formula_says_and_the_total_is_exact(allocation, share, density):
    scores = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    total = round(density * sum(map(prod, SHAPES.values())))
    kept = top_k(allocation.rank(scores), total)
    assert sum(int(mask.sum()) for mask in kept.values()) == total
    for name, expected in formula(share, total).items():
        assert abs(int(kept[name].sum()) - expected) <= 1
        best = top_k({name: scores[name]}, int(kept[name].sum()))[name]
        assert torch.equal(kept[name], best)


def test_small_tensors_stay_dense_and_vectors_share_one_fraction():
    scores = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    kept = top_k(ERK().rank(scores), 20000)
    assert bool(kept["stem"].all()) and not bool(kept["conv"].all())
    vectors = {"a": torch.randn(40), "b": torch.randn(80)}
    assert [int(m.sum()) for m in top_k(ERK().rank(vectors), 60).values()] == [20, 40]


def test_ties_are_broken_by_index():
    assert top_k(ERK().rank({"a": torch.ones(2, 3)}), 2)["a"].tolist() == [[True, True, False], [False] * 3]
