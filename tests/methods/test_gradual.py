from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

import secateur as sc
from secateur.testing.toys import toy, toy_batches


def test_the_sparsity_follows_the_cubic_curve_and_what_is_gone_stays_gone():
    model, x = toy("mlp")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = toy_batches("mlp")
    pruner = sc.Pruner(model, x, method="gradual", optimizers=sgd, total_steps=40, budget=sc.Budget(sparsity=0.9))
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    masks = []
    for i in range(40):
        inputs, target = data[i % len(data)]
        sgd.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        sgd.step()
        if pruner.step() is not None:
            masks.append({name: mask.clone() for name, mask in pruner._run.units.masks.items()})
    kept = [sum(int(mask.sum()) for mask in moment.values()) for moment in masks]
    gone = total - round(0.1 * total)
    expected = [total - gone * (1 - (1 - i / 10) ** 3) for i in range(1, 11)]
    assert all(abs(n - exact) <= 1 for n, exact in zip(kept, expected, strict=True))
    assert not any((b[name] & ~a[name]).any() for a, b in pairwise(masks) for name in a)


def test_channels_leave_physically_step_by_step():
    model, x = toy("mlp")
    pruned = sc.prune(
        model,
        x,
        method="gradual",
        granularity="channel",
        budget=sc.Budget(macs=0.3),
        data=toy_batches("mlp"),
        recovery={"name": "fine-tune", "epochs": 3, "lr": 0.05},
    )
    assert len(pruned.proofs) > 3 and pruned.after.macs <= 0.3 * pruned.before.macs


def test_it_is_a_recipe_of_parts_that_exist():
    recipe = sc.method("gradual").recipe
    assert (recipe.criterion.name, recipe.schedule.name) == ("magnitude", "cubic")
