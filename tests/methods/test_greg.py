"""GReg against its closed form, through `prune` and in a loop of the user's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.methods.experiments import TRAINED_ON, accuracy, batches, digits, trained_perceptron
from torch import nn

import secateur as sc
from secateur.core.hooks import Hooks
from secateur.parts.recovery.fine_tune import FineTune
from secateur.testing.toys import toy, toy_batches
from secateur.training.loop import Trainer


def quadratic(criterion, budget, steps=600, watch=lambda pruner: None):
    """L = 1/2 sum h (w - w0)² around w0 = (1, 1, 1, 5), trained by a loop of the user's own, without a cut yet."""
    h = torch.tensor([[1.0, 0.1, 0.01, 1.0]], dtype=torch.float64)
    start = torch.tensor([[1.0, 1.0, 1.0, 5.0]], dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(start)
    sgd = torch.optim.SGD(model.parameters(), lr=0.8)
    pruner = sc.Pruner(
        model,
        torch.zeros(1, 4, dtype=torch.float64),
        method="greg",
        criterion={"name": "greg", **criterion},
        optimizers=sgd,
        total_steps=2 * steps,
        budget=sc.Budget(sparsity=budget),
    )
    for _ in range(steps - 1):
        sgd.zero_grad()
        (0.5 * (h * (model.weight - start).square()).sum()).backward()
        sgd.step()
        pruner.step()
        watch(pruner)
    return model, h, start, pruner


def test_the_picked_shrink_by_their_curvature_and_the_others_stay():
    model, h, start, _ = quadratic({"ceiling": 0.1, "stabilize": 0.9}, 0.75)
    torch.testing.assert_close(model.weight.data[:, :3], (h / (h + 0.1))[:, :3], atol=1e-4, rtol=0)  # .909 .5 .0909
    torch.testing.assert_close(model.weight.data[:, 3], start[:, 3], atol=1e-12, rtol=0)


def test_the_second_variant_picks_by_what_the_penalty_leaves():
    """At first (1, 1, 1) are equal; where the loss is flat the penalty has shrunk the weight most."""
    picked = []

    def watch(pruner):
        picked.append(bool(pruner._run.hooks.scores))

    settings = {"variant": 2, "pick_ceiling": 0.1, "ceiling": 0.2, "picking": 0.5, "stabilize": 0.1}
    model, _, _, pruner = quadratic(settings, 0.25, watch=watch)
    hooks = pruner._run.hooks
    assert picked.index(True) == pytest.approx(0.5 * 0.9 * 600, abs=2)
    assert hooks._times["weight"].tolist() == [[0, 0, 1, 0]]
    assert model.weight[0, 2] < 0.1 and model.weight[0, 1] > 0.9  # the kept ones come back


def test_the_penalty_grows_and_never_falls_and_the_picks_never_change():
    strengths, picks = [], []

    def watch(pruner):
        state, hooks = pruner._learning._state, pruner._run.hooks
        strengths.append(hooks.strength(state.progress / (1 - hooks.settings.stabilize)))
        picks.append(hooks._times["weight"].clone())

    quadratic({"ceiling": 0.5}, 0.5, steps=50, watch=watch)
    assert strengths == sorted(strengths) and strengths[-1] == 0.5 and strengths[0] < 0.02
    assert all(torch.equal(picks[0], later) for later in picks)


def test_a_penalty_of_zero_is_plain_training_bit_by_bit():
    data, settings = toy_batches("mlp"), FineTune(epochs=1, lr=0.05)
    model, x = toy("mlp")
    plain, seen = copy.deepcopy(model), []
    Trainer(plain, settings, hooks=(Hooks(),)).run(data, 0, 4)
    sc.prune(
        model,
        x,
        method="greg",
        criterion={"name": "greg", "ceiling": 0.0},
        budget=sc.Budget(sparsity=0.5),
        data=data,
        recovery=FineTune(epochs=2, lr=0.05),
        on_step=lambda state: seen.append(copy.deepcopy(state.model.state_dict())),
    )
    assert all(torch.equal(seen[3][name], tensor) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("granularity", ["weight", "channel"])
@pytest.mark.parametrize("variant", [1, 2])
def test_what_was_picked_is_cut_and_of_whole_units_nothing_was_left(granularity, variant):
    """Without batch normalization the penalty takes units to zero (specification 7 f), weights to -gradient/lambda."""
    model, x = toy("mlp")
    sgd = torch.optim.SGD(model.parameters(), lr=0.3)
    data = toy_batches("mlp")
    pruner = sc.Pruner(
        model,
        x,
        method="greg",
        criterion={"name": "greg", "variant": variant, "ceiling": 3.0},
        granularity=granularity,
        optimizers=sgd,
        total_steps=200,
        budget=sc.Budget(sparsity=0.5),
    )
    hooks, picks = pruner._run.hooks, {}
    for i in range(100):
        inputs, target = data[i % 4]
        sgd.zero_grad()
        (F.cross_entropy(model(inputs), target)).backward()
        sgd.step()
        if i == 60:
            picks = pruner._run.choose(hooks.scores)
        before = model(x).detach()
        pruner.step()
    assert pruner.done
    if granularity == "weight":
        assert all(torch.equal(picks[name], mask) for name, mask in pruner.result().masks.items())
    else:
        axes = pruner.result().structure_plan.axes
        torch.testing.assert_close(model(x).detach(), before, atol=1e-4, rtol=1e-4)
        assert all(list(axes[name].kept) == mask.nonzero().flatten().tolist() for name, mask in picks.items())


@pytest.mark.parametrize("seed", [0, 1])
def test_right_after_the_cut_it_ends_far_above_cutting_the_same_units_at_once(seed):
    """Specification 7 f: 80 % of the hidden units of each layer, without batch normalization, on digits."""
    x, y = digits()
    model = trained_perceptron(seed, 64, 300, 100, 10, x=x[:TRAINED_ON], y=y[:TRAINED_ON], epochs=30)
    options = {"granularity": "channel", "budget": sc.Budget(sparsity=0.8), "allocation": "uniform"}
    at_once = sc.prune(model, x[:1], method="magnitude", criterion={"name": "magnitude", "p": 1}, **options)
    grown = sc.prune(
        model,
        x[:1],
        method="greg",
        data=batches(x[:TRAINED_ON], y[:TRAINED_ON]),
        schedule={"name": "one-shot", "at": 0.98},
        recovery=FineTune(epochs=15, lr=0.03, lr_schedule="constant"),
        **options,
    )
    assert at_once.structure_plan.axes == grown.structure_plan.axes  # the same picks
    held_out = x[TRAINED_ON:], y[TRAINED_ON:]
    # 20 points and the same picks are the check of the specification (7 f); here seeds 0 and 1 differ by 61 and 46.
    assert accuracy(grown.model, *held_out) > accuracy(at_once.model, *held_out) + 20


def test_it_works_through_prune_and_goes_on_from_a_checkpoint():
    model, x = toy("mlp")
    options = {"method": "greg", "granularity": "channel", "budget": sc.Budget(macs=0.5)}
    pruned = sc.prune(model, x, data=toy_batches("mlp"), recovery=FineTune(epochs=2, lr=0.05), **options)
    assert pruned.after.macs <= 0.5 * pruned.before.macs
    models = [copy.deepcopy(model) for _ in range(2)]
    pruners = [
        sc.Pruner(m, x, optimizers=torch.optim.SGD(m.parameters(), lr=0.1), total_steps=8, **options) for m in models
    ]
    with torch.no_grad():
        models[0][1].weight.mul_(torch.rand_like(models[0][1].weight))  # its picks were made before
    pruners[1].load_state_dict(pruners[0].state_dict())
    hooks = [pruner._run.hooks for pruner in pruners]
    assert all(torch.equal(hooks[0]._times[name], times) for name, times in hooks[1]._times.items())
