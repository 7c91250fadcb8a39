"""Movement pruning: checks C1 to C6 of its specification, and both doors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.methods.experiments import TRAINED_ON, accuracy, batches, digits, trained_perceptron
from torch import nn

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.engine import Run
from secateur.core.hooks import TrainingState
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.methods.movement import Movement, chance_of_nonzero, hard_concrete
from secateur.parts.recovery.distill import Distill
from secateur.parts.recovery.fine_tune import FineTune
from secateur.parts.weight_factors import WeightFactors
from secateur.testing.toys import toy, toy_batches

HALF = sc.Budget(sparsity=0.5)


def started(model, x, granularity="weight", steps=100, **settings):
    """The hooks of a run that has just begun."""
    recipe = sc.method("movement").recipe.but(criterion=Movement(**settings), granularity=granularity)
    units = recipe.granularity.units(model, x, Scope())
    run = Run(recipe, units, HALF, cost_of("sparsity"))
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, steps)
    run.hooks.on_start(state)
    return run.hooks, run, state


def train(pruner, optimizer, steps, start=0):
    """A user's own loop."""
    data = toy_batches("mlp")
    for i in range(start, start + steps):
        inputs, target = data[i % 4]
        optimizer.zero_grad()
        F.cross_entropy(pruner.model(inputs), target).backward()
        optimizer.step()
        pruner.step()


def test_where_the_new_task_needs_other_inputs_it_ends_above_magnitude():
    """Specification 1 f, from the left half of the digits to the right half: 97 % of each hidden layer."""
    x, y = digits()
    on_the_left = (torch.arange(64) % 8 < 4).float()
    left, right = x * on_the_left, x * (1 - on_the_left)
    slots = {
        "magnitude": {"schedule": {"name": "cubic", "steps": 20, "start": 0.1, "end": 0.8}},
        "movement": {"schedule": {"name": "one-shot", "at": 0.8}},
    }
    found = dict.fromkeys(slots, 0.0)
    for seed in range(2):
        model = trained_perceptron(seed, 64, 100, 100, 10, x=left[:TRAINED_ON], y=y[:TRAINED_ON], epochs=20)
        for method, own in slots.items():
            pruned = sc.prune(
                model,
                x[:1],
                method=method,
                allocation="uniform",
                scope=Scope(exclude=("4.weight",)),  # the paper leaves the head whole
                budget=sc.Budget(sparsity=0.97),
                data=batches(right[:TRAINED_ON], y[:TRAINED_ON]),
                recovery=FineTune(epochs=10, optimizer="adamw", lr=0.001, weight_decay=0, lr_schedule="constant"),
                seed=seed,
                **own,
            )
            found[method] += accuracy(pruned.model, right[TRAINED_ON:], y[TRAINED_ON:]) / 2
    # The specification asks for 3 points in its setting; here seeds 0 and 1 differ by 33 and 45: about half of 33.
    assert found["movement"] > found["magnitude"] + 15


def test_all_entries_get_gradients_of_their_scores_and_masked_weights_get_none():
    """C1: dL/dS = dL/dW' x W, also where masked; dL/dW = dL/dW' x M."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3).double(), torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3).double()
    hooks, _, _ = started(model, x)
    mask = (torch.arange(15).view(3, 5) % 2).double()
    with torch.no_grad():
        hooks.factors["weight"].copy_(mask)
    masked = (model.parametrizations.weight.original.detach() * mask).requires_grad_()
    (slope,) = torch.autograd.grad((F.linear(x, masked, model.bias) - y).pow(3).sum(), masked)
    (model(x) - y).pow(3).sum().backward()
    weight = model.parametrizations.weight.original
    torch.testing.assert_close(hooks.factors["weight"].grad.double(), slope * weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, slope * mask)
    assert not weight.grad[mask == 0].any() and hooks.factors["weight"].grad[mask == 0].all()


def test_with_sgd_a_score_is_the_sum_of_what_the_weight_has_moved():
    """C2: S_T = -alpha x sum of dL/dW' x W, also for masked weights."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 3), torch.randn(7, 5), torch.randn(7, 3)
    hooks, _, state = started(model, x, warmup=0.4)
    hooks.optimizer = torch.optim.SGD(list(hooks.scores.values()), lr=0)
    hooks.learning_rate = lambda progress: 0.1
    first = hooks.scores["weight"].detach().clone()
    weight, total = model.parametrizations.weight.original, torch.zeros(3, 5)
    for _ in range(20):
        state.optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        total += 0.1 * weight.grad * weight.detach()  # nothing is masked yet: W' = W
        hooks.after_backward(state)
        state.optimizer.step()
    torch.testing.assert_close(hooks.scores["weight"].detach() - first, -total, rtol=1e-5, atol=1e-6)


def test_the_schedule_is_cubic_between_warmup_and_cooldown():
    """C3."""
    model, x = toy("mlp")
    hooks, _, _ = started(model, x, warmup=0.1, cooldown=0.2)
    ramp = [hooks.ramp(i / 100, 1.0, 0.15) for i in range(101)]
    assert ramp[:11] == [1.0] * 11 and all(value == 0.15 for value in ramp[81:])
    assert ramp == sorted(ramp, reverse=True) and ramp[45] == pytest.approx(0.15 + 0.85 / 8)


def test_the_gradient_of_a_block_is_the_sum_over_its_entries():
    """C4, for channels and heads: over the entries that read them; for blocks: over their own."""
    cases = (("resnet20", "channel"), ("vit", "head"), ("vit", {"name": "block", "shape": [5, 7]}))
    for network, granularity in cases:
        model, x = toy(network)
        hooks, run, state = started(model, x, granularity)
        for inputs, target in toy_batches(network)[:1]:
            F.cross_entropy(model(inputs), target).backward()
        expected = run.units.sum({n: p.detach() * p.grad for n, p in run.units.parameters().items()}, consumed=True)
        for group, factor in hooks.factors.items():
            torch.testing.assert_close(factor.grad, expected[group], rtol=1e-3, atol=1e-6)
        hooks.on_end(state)


@pytest.mark.parametrize("granularity", ["weight", "channel", {"name": "block", "shape": [4, 4]}])
def test_the_cut_network_computes_what_the_masked_one_computed(granularity):
    """C5, and everything that the forward pass had is gone."""
    model, x = toy("mlp")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    order = [name for name, _ in model.named_parameters()]
    pruner = sc.Pruner(
        model, x, method="movement", granularity=granularity, optimizers=sgd, total_steps=80, budget=HALF
    )
    train(pruner, sgd, 39)
    hooks, kept = pruner._run.hooks, {}
    data = toy_batches("mlp")[39 % 4]
    sgd.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    sgd.step()
    after_step = type(hooks).after_step
    outputs = []

    def watch(self, state):
        after_step(self, state)
        kept.update({g: f.detach().bool() for g, f in self.factors.items()})
        outputs.append(model(x).detach())

    type(hooks).after_step = watch
    try:
        pruner.step()
    finally:
        type(hooks).after_step = after_step
    assert pruner.done and [name for name, _ in model.named_parameters()] == order
    torch.testing.assert_close(model(x), outputs[0], rtol=1e-5, atol=1e-5)
    total = sum(mask.numel() for mask in kept.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == round(0.5 * total)


def test_hard_concrete_by_hand():
    """C6: at S = logit(0.9) the chance of a non-zero factor is sigmoid(2.197 + 1.5986)."""
    assert float(chance_of_nonzero(torch.tensor(math.log(9)))) == pytest.approx(0.9780, abs=1e-4)
    noise = torch.logit(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    for score in (-2.0, 0.0, math.log(9)):
        drawn = hard_concrete(torch.tensor(score), noise)
        chance = float(chance_of_nonzero(torch.tensor(score)))
        assert float((drawn > 0).double().mean()) == pytest.approx(chance, abs=4 * math.sqrt(0.25 / 200_000))
        assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1


def test_the_gradients_of_both_penalties_are_those_of_their_formulas():
    model, x = nn.Linear(5, 3), torch.randn(2, 5)
    for mask, value in (("soft", torch.sigmoid), ("l0", chance_of_nonzero)):
        net = copy.deepcopy(model)
        hooks, _, state = started(net, x, mask=mask, penalty=7.0)
        state.step = 90  # the ramp is over
        with torch.no_grad():
            hooks.scores["weight"].normal_()
        found = hooks.gradient("weight", torch.zeros(3, 5), state)
        score = hooks.scores["weight"].detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(7.0 * value(score).mean(), score)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mask", ["soft", "l0"])
def test_penalties_empty_the_network_and_the_budget_is_met_exactly_all_the_same(mask):
    model, x = toy("mlp")
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    criterion = {"name": "movement", "mask": mask, "penalty": 1e4, "lr": 0.2}
    pruner = sc.Pruner(model, x, method="movement", criterion=criterion, optimizers=sgd, total_steps=120, budget=HALF)
    train(pruner, sgd, 59)
    share = torch.cat([f.detach().flatten() for f in pruner._run.hooks.factors.values()]).bool().double().mean()
    assert share < 0.5
    train(pruner, sgd, 1)
    masks = pruner.result().masks
    assert sum(int(m.sum()) for m in masks.values()) == round(0.5 * sum(m.numel() for m in masks.values()))


@pytest.mark.parametrize(
    "recovery", [FineTune(epochs=4, lr=0.05), Distill(epochs=4, lr=0.05, alpha=0.5, temperature=2)]
)
@pytest.mark.parametrize("granularity", ["weight", "head"])
def test_it_works_through_prune_with_and_without_a_teacher(granularity, recovery):
    model, x = toy("vit")
    pruned = sc.prune(
        model,
        x,
        method="movement",
        granularity=granularity,
        budget=sc.Budget(sparsity=0.5),
        scope={"include": ["*attention*"]},
        data=toy_batches("vit"),
        recovery=recovery,
    )
    assert not any("parametrizations" in name for name, _ in pruned.model.named_parameters())
    assert pruned.after.nonzero_params < pruned.before.params


def test_it_goes_on_from_a_checkpoint():
    def fresh():
        model, x = toy("mlp")
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, sgd, sc.Pruner(model, x, method="movement", optimizers=sgd, total_steps=60, budget=HALF)

    model, sgd, pruner = fresh()
    train(pruner, sgd, 20)
    again, other_sgd, other = fresh()
    other.load_state_dict(copy.deepcopy(pruner.state_dict()))
    again.load_state_dict(model.state_dict())
    other_sgd.load_state_dict(copy.deepcopy(sgd.state_dict()))
    train(pruner, sgd, 40, start=20)
    train(other, other_sgd, 40, start=20)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_cannot_be_masked_is_refused_with_the_reason():
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="masks single weights"):
        started(model, x, "channel", mask="l0")
    lstm = nn.LSTM(4, 3)
    with pytest.raises(NotApplicable, match="reads its weights from a list"):
        started(lstm, torch.randn(2, 1, 4))


def test_a_weight_that_two_modules_hold_is_masked_in_both():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    units = sc.method("movement").recipe.granularity.units(model, torch.randn(1, 4), Scope())
    with WeightFactors(units).applied({"0.weight": torch.zeros(4, 4)}):
        assert torch.equal(model(torch.randn(1, 4))[0], model[1].bias)
    assert model[1].weight is model[0].weight
