"""ADMM: its projection, a convex problem with a known answer, and both doors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.methods.experiments import TRAINED_ON, accuracy, batches, digits, trained_perceptron
from torch import nn

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.engine import Run
from secateur.core.hooks import TrainingState
from secateur.core.recipe import Recipe
from secateur.core.slots import Scope
from secateur.methods.admm import ADMM
from secateur.parts.recovery.fine_tune import FineTune
from secateur.testing.toys import toy, toy_batches


def started(granularity="weight", sparsity=0.5, **settings):
    model, x = toy("mlp")
    recipe = sc.method("admm").recipe.but(criterion=ADMM(**settings), granularity=granularity)
    units = recipe.granularity.units(model, x, Scope())
    run = Run(recipe, units, sc.Budget(sparsity=sparsity), cost_of("sparsity"))
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, 8)
    run.hooks.on_start(state)
    return model, units, run, state


def test_the_projection_is_the_nearest_point_with_as_many_entries():
    _, units, run, _ = started()
    values = {name: torch.randn_like(p) for name, p in units.parameters().items()}
    nearest = run.hooks.projected(values)
    again = run.hooks.projected(nearest)
    kept = run.choose({name: v.abs() for name, v in values.items()})
    for name, value in values.items():
        assert torch.equal(nearest[name], again[name]) and int(nearest[name].count_nonzero()) == int(kept[name].sum())
        distance = (value - nearest[name]).norm()
        for _ in range(100):
            other = torch.zeros_like(value).flatten()
            index = torch.randperm(other.numel())[: int(kept[name].sum())]
            other[index] = value.flatten()[index]
            assert distance <= (value.flatten() - other).norm()


def test_a_projected_network_computes_what_the_cut_network_computes():
    model, units, run, _ = started("channel")
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, value in zip(units.parameters().values(), run.hooks.sparse.values(), strict=True):
            parameter.copy_(value)
        inputs = torch.randn(5, 3, 4, 4)
        projected = model(inputs)
        run.prune()
        torch.testing.assert_close(model(inputs), projected)
        assert not torch.allclose(dense(inputs), projected)


def test_the_dual_follows_rho_so_that_their_product_stays():
    _, _, run, state = started(rhos=(1.0, 0.1), iterations=2)
    hooks = run.hooks
    gaps = {name: p.detach() - hooks.sparse[name] for name, p in run.units.parameters().items()}
    state.step = 4
    hooks.after_step(state)  # U was 0, so 1.0 x (0 + gap) before and 0.1 x U now
    assert hooks.rho == 0.1
    for name, gap in gaps.items():
        torch.testing.assert_close(0.1 * hooks.dual[name], gap)


def test_a_convex_problem_ends_at_a_sparse_point_where_the_gradients_cancel():
    """min 1/2 ||x W' - y||² with a sparse answer: W = Z, its support is that of Z, and grad f(W) + rho U = 0."""
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    answer = torch.tensor([[2.0, 0, 0, -1.5, 0, 0], [0, 1.0, 0, 0, 3.0, 0]], dtype=torch.float64)
    y = x @ answer.T
    model = nn.Linear(6, 2, bias=False).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.2)
    pruner = sc.Pruner(
        model,
        x[:1],
        method="admm",
        criterion={"name": "admm", "rhos": [0.5], "iterations": 60},
        optimizers=sgd,
        total_steps=2400,
        budget=sc.Budget(sparsity=2 / 3),
    )
    hooks = pruner._run.hooks

    def loss():
        return 0.5 * (model(x) - y).square().sum() / len(x)

    for _ in range(1199):
        sgd.zero_grad()
        loss().backward()
        sgd.step()
        pruner.step()
    assert hooks.residuals[-1] < 1e-3 and hooks.residuals[-1] < 0.01 * hooks.residuals[0]
    (slope,) = torch.autograd.grad(loss(), model.weight)
    torch.testing.assert_close(slope + 0.5 * hooks.dual["weight"], torch.zeros_like(slope), atol=1e-3, rtol=0)
    support = hooks.sparse["weight"] != 0
    assert torch.equal(support, answer != 0)
    sgd.zero_grad()
    loss().backward()
    sgd.step()
    pruner.step()
    assert torch.equal(pruner.result().masks["weight"], support)


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_it_works_through_prune_and_what_is_cut_stays_cut(granularity):
    model, x = toy("mlp")
    pruned = sc.prune(
        model,
        x,
        method="admm",
        granularity=granularity,
        budget=sc.Budget(sparsity=0.6),
        data=toy_batches("mlp"),
        recovery=FineTune(epochs=4, lr=0.1),
    )
    parameters = dict(pruned.model.named_parameters())
    assert all(not parameters[name][~mask].any() for name, mask in pruned.masks.items())


def test_weights_and_projection_meet_before_the_cut():
    """Specification 3 f: W - Z to zero, and so the cut itself costs little; in a loop of the user's own."""
    model, x = toy("mlp")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = sc.Pruner(model, x, method="admm", optimizers=sgd, total_steps=480, budget=sc.Budget(sparsity=0.6))
    data = toy_batches("mlp")
    for i in range(240):
        inputs, target = data[i % 4]
        sgd.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        sgd.step()
        before = model(x).detach()
        pruner.step()
    residuals = pruner._run.hooks.residuals
    assert pruner.done and len(residuals) == 16 and residuals[-1] < 0.1 * max(residuals)
    assert (model(x) - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("seed", [0, 1])
def test_right_after_the_cut_it_ends_far_above_pruning_the_smallest_weights_at_once(seed):
    """Specification 3 f: 90 % of each layer, on digits."""
    x, y = digits()
    data = batches(x[:TRAINED_ON], y[:TRAINED_ON])
    model = trained_perceptron(seed, 64, 100, 100, 10, x=x[:TRAINED_ON], y=y[:TRAINED_ON])
    options = {"budget": sc.Budget(sparsity=0.9), "allocation": "uniform"}
    at_once = sc.prune(model, x[:1], method="magnitude", **options).model
    adam, steps = torch.optim.Adam(model.parameters(), lr=0.002), 24 * len(data)
    pruner = sc.Pruner(model, x[:1], method="admm", optimizers=adam, total_steps=2 * steps, **options)
    for i in range(steps):
        inputs, target = data[i % len(data)]
        adam.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        adam.step()
        pruner.step()
    assert pruner.done and pruner._run.hooks.residuals[-1] < 0.15
    held_out = x[TRAINED_ON:], y[TRAINED_ON:]
    # Both thresholds are the check of the specification (3 f), 20 points; here seeds 0 and 1 differ by 37 and 54.
    assert accuracy(model, *held_out) > accuracy(at_once, *held_out) + 20


def test_it_goes_on_from_a_checkpoint():
    model, x = toy("mlp")
    options = {"method": "admm", "budget": sc.Budget(sparsity=0.5), "total_steps": 40}
    data = toy_batches("mlp")

    def train(pruner, optimizer, steps):
        for i in range(steps):
            inputs, target = data[i % 4]
            optimizer.zero_grad()
            F.cross_entropy(pruner.model(inputs), target).backward()
            optimizer.step()
            pruner.step()

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, optimizers=sgd, **options)
    train(pruner, sgd, 8)
    again, _ = toy("mlp")
    other_sgd = torch.optim.SGD(again.parameters(), lr=0.1)
    other = sc.Pruner(again, x, optimizers=other_sgd, **options)
    other.load_state_dict(copy.deepcopy(pruner.state_dict()))
    again.load_state_dict(model.state_dict())
    train(pruner, sgd, 20)
    train(other, other_sgd, 20)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_retraining_remembers_nothing_of_the_pull():
    model, units, run, state = started()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.param_groups[0]["momentum"] = 0.9
    state.optimizer.step()
    pulled = [p for p in units.parameters().values() if p in state.optimizer.state]
    run.hooks.on_end(state)
    assert pulled and not any(p in state.optimizer.state for p in units.parameters().values())


def test_settings_are_checked():
    with pytest.raises(sc.SecateurError, match="rhos"):
        Recipe(criterion={"name": "admm", "rhos": []})
