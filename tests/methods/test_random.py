from __future__ import annotations

import torch

import secateur as sc
from secateur.core.slots import Scope
from secateur.methods.random import Random
from secateur.parts.granularity.weight import Weight
from secateur.testing.toys import toy


def test_scores_are_uniform_and_the_seed_controls_them():
    model, x = toy("resnet20")
    units = Weight().units(model, x, Scope())
    a, b, c = (Random().score(sc.Context(units, seed=s)) for s in (1, 1, 2))
    flat = torch.cat([v.flatten() for v in a.values()])
    assert all(torch.equal(a[g], b[g]) for g in a) and not torch.equal(a["fc.weight"], c["fc.weight"])
    assert 0 <= flat.min() and flat.max() < 1 and abs(flat.mean() - 0.5) < 0.01 and abs(flat.std() - 12**-0.5) < 0.01


def test_every_group_loses_about_the_same_fraction():
    model, x = toy("resnet20")
    masks = sc.prune(model, x, method="random", budget=sc.Budget(sparsity=0.7)).masks
    large = {name: mask for name, mask in masks.items() if mask.numel() > 2000}
    assert large and all(abs(mask.float().mean() - 0.3) < 0.05 for mask in large.values())
