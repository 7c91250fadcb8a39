"""Streams of random numbers that have nothing in common."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.randomness import generator_for, seed_for


def test_each_purpose_and_each_seed_has_numbers_of_its_own_that_never_change():
    seeds = {seed_for(purpose, seed) for purpose in ("scores", "masks") for seed in (0, 1)}
    assert len(seeds) == 4 and seeds.isdisjoint({0, 1}) and all(0 <= seed < 2**56 for seed in seeds)
    assert seed_for("scores", 0) == 32679809217133604
    a, b = (torch.randn(2000, generator=generator_for("scores", 3)) for _ in range(2))
    other = torch.randn(2000, generator=generator_for("masks", 3))
    assert torch.equal(a, b) and abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 0.1


def drawn(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_masks_know_nothing_of_weights_that_the_same_seed_drew(seed):
    """The numbers of one seed once chose the largest weights of the network that it had drawn."""
    model = drawn(seed)
    kept = sc.prune(model, torch.zeros(1, 100), method="random", budget=sc.Budget(sparsity=0.9), seed=seed).model
    left = kept[0].weight[kept[0].weight != 0]
    assert abs(float((left > 0).float().mean()) - 0.5) < 0.08  # 1,000 of them: 5 standard errors


def test_fresh_weights_are_not_those_that_the_same_seed_drew_before():
    model = drawn(0)
    budget = sc.Budget(sparsity=0.5)
    fresh = sc.prune(model, torch.zeros(1, 100), method="magnitude", weights_from="fresh", budget=budget, seed=0).model
    kept = fresh[0].weight != 0
    assert not (fresh[0].weight[kept] == model[0].weight[kept]).any()
    again = sc.prune(model, torch.zeros(1, 100), method="magnitude", weights_from="fresh", budget=budget, seed=0).model
    assert torch.equal(fresh[0].weight, again[0].weight)
