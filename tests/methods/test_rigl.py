"""RigL and SET in training, through `prune` and in a loop of the user's own."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.errors import InvalidRecipe
from secateur.parts.recovery.fine_tune import FineTune
from secateur.testing.toys import toy, toy_batches
from secateur.training.loop import make_optimizer

SPARSE = sc.Budget(sparsity=0.8)


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def train(pruner, optimizer, data, steps, watch=lambda: None):
    """A user's own loop."""
    for i in range(steps):
        inputs, target = data[i % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(pruner.model(inputs), target).backward()
        optimizer.step()
        pruner.step()
        watch()


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_as_many_weights_of_each_tensor_at_every_step_and_the_mask_stays_in_the_end(method):
    model, x = toy("mlp")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    pruner = sc.Pruner(model, x, method=method, optimizers=sgd, total_steps=41, budget=SPARSE)
    masks = []

    def watch():
        now = pruner._run.units.masks
        assert all(not p[~now[n]].any() for n, p in model.named_parameters() if n in now)
        masks.append({name: mask.clone() for name, mask in now.items()})

    train(pruner, sgd, toy_batches("mlp"), 41, watch)
    assert all(counts(m) == counts(masks[0]) for m in masks)
    total = sum(mask.numel() for mask in masks[0].values())
    assert sum(counts(masks[0]).values()) == round(0.2 * total)
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(masks)]
    assert any(changed[:28]) and not any(changed[30:])  # until = 0.75 of 40 steps


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_prune_and_a_loop_of_the_users_own_give_the_same_network(method):
    settings = FineTune(epochs=5, lr=0.05, lr_schedule="constant")
    data = [(a.double(), b) for a, b in toy_batches("mlp")]
    model, x = toy("mlp")
    model, x = model.double(), x.double()
    options = {"method": method, "budget": SPARSE, "criterion": {"name": method, "updates": 4}}
    found = sc.prune(model, x, data=data, recovery=settings, **options)

    twin = copy.deepcopy(model).train()
    optimizer = make_optimizer(twin, settings)
    pruner = sc.Pruner(twin, x, optimizers=optimizer, total_steps=21, **options)
    pruner.step()  # before any training, as `prune` does
    train(pruner, optimizer, data, 20)
    result = pruner.result()
    assert all(torch.equal(found.masks[n], m) for n, m in result.masks.items())
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), result.model.parameters(), strict=True))


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_what_was_changed_goes_on_from_a_checkpoint(method):
    data = toy_batches("mlp")

    def fresh():
        model, x = toy("mlp")
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, sgd, sc.Pruner(model, x, method=method, optimizers=sgd, total_steps=24, budget=SPARSE)

    model, sgd, pruner = fresh()
    train(pruner, sgd, data, 12)
    again, other_sgd, other = fresh()
    other.load_state_dict(copy.deepcopy(pruner.state_dict()))
    again.load_state_dict(model.state_dict())
    other_sgd.load_state_dict(copy.deepcopy(sgd.state_dict()))
    train(pruner, sgd, data, 12)
    train(other, other_sgd, data, 12)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_gradients_choose_better_than_chance_and_both_better_than_a_mask_that_stays():
    """Specification 6.3 f, on digits at 98 % sparsity."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    data = list(zip(x[:1200].split(100), y[:1200].split(100), strict=True))
    accuracy = {}
    for method in ("random", "set", "rigl"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        pruned = sc.prune(
            model,
            x[:1],
            method=method,
            allocation="erk",
            budget=sc.Budget(sparsity=0.98),
            data=data,
            recovery={"name": "fine-tune", "epochs": 16, "optimizer": "adamw", "lr": 0.02},
        )
        accuracy[method] = float((pruned.model(x[1200:]).argmax(1) == y[1200:]).float().mean())
    assert accuracy["rigl"] > accuracy["set"] > accuracy["random"]


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_without_training_the_random_mask_is_refused(method):
    model, x = toy("mlp")
    with pytest.raises(InvalidRecipe, match=f"'{method}' works while the network trains, and this recipe trains"):
        sc.prune(model, x, method=method, budget=sc.Budget(sparsity=0.5))
