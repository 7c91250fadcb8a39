"""Gibbs pruning: its samplers against closed forms and enumerations, and both doors."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tests.methods.experiments import TRAINED_ON, accuracy, batches, digits, trained_perceptron
from torch import nn

import secateur as sc
from secateur.errors import NotApplicable
from secateur.methods.gibbs import draw_coupled, draw_halves, draw_independent, mean_squares
from secateur.parts.recovery.fine_tune import FineTune
from secateur.testing.toys import toy, toy_batches

DRAWS = 20_000
HALF = sc.Budget(sparsity=0.5)
FIELD = torch.tensor([0.3, -0.2, 0.1, 0.15])


def seeded():
    return torch.Generator().manual_seed(0)


def frequencies(spins):
    """How often each state comes, by its spins read as a binary number."""
    n = spins.shape[1]
    states = (spins.long() * 2 ** torch.arange(n - 1, -1, -1)).sum(1)
    return torch.bincount(states, minlength=2**n).double() / len(spins)


def enumerated(energy, beta, n):
    """The Gibbs distribution, state by state in the same order."""
    weights = [math.exp(-beta * energy(state)) for state in itertools.product((-1, 1), repeat=n)]
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def agree(found, expected):
    """Within four standard errors of each frequency."""
    assert bool(((found - expected).abs() <= 4 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-12).all())


def test_independent_spins_have_their_closed_form():
    drawn = draw_independent(FIELD.expand(DRAWS, 4), 1.0, seeded()).double().mean(0)
    agree(drawn, torch.sigmoid(-2 * FIELD).double())
    expected = [0.354, 0.599, 0.450]  # of the specification, for b = 0.3, -0.2, 0.1
    assert torch.sigmoid(-2 * FIELD[:3]).tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("beta", [0.3, 1.5])
def test_coupled_spins_have_the_distribution_that_enumeration_gives(beta):
    b, c = FIELD[:3].tolist(), 0.2

    def energy(x):
        pairs = sum(x[i] * x[j] for i in range(3) for j in range(3) if i != j)
        return sum(f * s for f, s in zip(b, x, strict=True)) - c * pairs

    spins = draw_coupled(FIELD[:3].expand(DRAWS, 3), beta, c, seeded())
    agree(frequencies(spins), enumerated(energy, beta, 3))


def test_halves_drawn_by_turns_have_the_distribution_that_enumeration_gives():
    b, c, beta = FIELD.tolist(), 0.4, 0.8

    def energy(x):
        return sum(f * s for f, s in zip(b, x, strict=True)) - c * sum(x[i] * x[j] for i in (0, 1) for j in (2, 3))

    field = FIELD.expand(DRAWS, 4)
    spins = draw_halves(field, torch.ones_like(field, dtype=torch.bool), beta, c, 30, seeded())
    agree(frequencies(spins), enumerated(energy, beta, 4))


def test_infinitely_hot_is_a_coin_and_cold_is_the_cut():
    field = torch.randn(100, 9, generator=seeded())
    start = torch.ones_like(field, dtype=torch.bool)
    for draw in (
        lambda beta, c: draw_independent(field, beta, seeded()),
        lambda beta, c: draw_coupled(field, beta, c, seeded()),
        lambda beta, c: draw_halves(field, start, beta, c, 5, seeded()),
    ):
        assert float(draw(0.0, 1.0).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 30)
        assert torch.equal(draw(1e9, 0.0), field < 0)


def test_strong_coupling_keeps_or_removes_whole_kernels():
    field = torch.randn(200, 9, generator=seeded())
    spins = draw_coupled(field, 1.0, 10.0, seeded())
    assert bool((spins.all(1) | ~spins.any(1)).all())
    cold = draw_coupled(field, 1e6, 10.0, seeded())
    assert torch.equal(cold.all(1), field.sum(1) < 0)


def test_means_belong_to_kernels_and_filters():
    weight = torch.randn(3, 2, 3, 3)
    assert torch.equal(mean_squares(weight, "weight"), weight.square())
    torch.testing.assert_close(mean_squares(weight, "kernel")[1, 0], weight[1, 0].square().mean().expand(3, 3))
    torch.testing.assert_close(mean_squares(weight, "filter")[2], weight[2].square().mean().expand(2, 3, 3))


def trained(hamiltonian="weight", network="mlp", **settings):
    """A user's own loop, up to the step before the cut."""
    model, x = toy(network)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    criterion = {"name": "gibbs", "hamiltonian": hamiltonian, "sweeps": 3, **settings}
    pruner = sc.Pruner(model, x, method="gibbs", criterion=criterion, optimizers=sgd, total_steps=40, budget=HALF)
    data = toy_batches(network)

    def step(i):
        inputs, target = data[i % 4]
        sgd.zero_grad()
        F.cross_entropy(model(inputs), target).backward()
        sgd.step()
        pruner.step()

    for i in range(19):
        step(i)
    return pruner, model, step


def test_masked_weights_get_no_gradient_and_the_cold_mask_is_the_cut():
    pruner, model, step = trained(beta=(1e8, 1e9))
    hooks = pruner._run.hooks
    mask = hooks.masks["1.weight"].bool()
    inputs, target = toy_batches("mlp")[0]
    model.zero_grad()
    F.cross_entropy(model(inputs), target).backward()
    slope = model[1].parametrizations.weight.original.grad
    assert not slope[~mask].any() and slope[mask].any() and 0 < int(mask.sum()) < mask.numel()
    kept = pruner._run.choose({n: p.detach().square() for n, p in pruner._run.units.parameters().items()})
    assert all(torch.equal(hooks.masks[name].bool(), value) for name, value in kept.items())
    step(19)
    assert pruner.done and not any("parametrizations" in name for name, _ in model.named_parameters())


def test_the_temperature_falls_geometrically():
    pruner, _, _ = trained(beta=(1.0, 1e4), anneal=0.5)
    hooks, state = pruner._run.hooks, pruner._learning._state
    found = []
    for state.step in (0, 5, 10, 15):
        found.append(hooks.beta(state))
    assert found == pytest.approx([1, 100, 1e4, 1e4])


@pytest.mark.parametrize("hamiltonian", ["kernel", "filter"])
def test_whole_kernels_and_filters_are_cut(hamiltonian):
    pruner, _, step = trained(hamiltonian, network="squeeze_excite")
    step(19)
    for mask in pruner.result().masks.values():
        rows = mask.flatten(2).flatten(0, 1) if hamiltonian == "kernel" and mask.dim() > 2 else mask.flatten(1)
        if hamiltonian == "filter" or mask.dim() > 2:
            mixed = rows.any(1) & ~rows.all(1)
            assert int(mixed.sum()) <= 1  # the exact count may end inside one


def test_it_works_through_prune():
    model, x = toy("mlp")
    pruned = sc.prune(
        model,
        x,
        method="gibbs",
        budget=sc.Budget(sparsity=0.8),
        data=toy_batches("mlp"),
        recovery=FineTune(epochs=4, lr=0.05),
    )
    assert sum(int(m.sum()) for m in pruned.masks.values()) == round(
        0.2 * sum(m.numel() for m in pruned.masks.values())
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_annealing_from_new_weights_ends_far_above_pruning_a_trained_network_at_once(seed):
    """Specification 9 f: 97 % of each layer, nothing trained after the cut, on digits."""
    x, y = digits()
    dense, fresh = (
        trained_perceptron(seed, 64, 300, 100, 10, x=x[:TRAINED_ON], y=y[:TRAINED_ON], epochs=epochs)
        for epochs in (10, 0)
    )
    options = {"budget": sc.Budget(sparsity=0.97), "allocation": "uniform"}
    at_once = sc.prune(dense, x[:1], method="magnitude", **options)
    annealed = sc.prune(
        fresh,
        x[:1],
        method="gibbs",
        data=batches(x[:TRAINED_ON], y[:TRAINED_ON]),
        schedule={"name": "one-shot", "at": 0.99},
        recovery=FineTune(epochs=12, optimizer="adamw", lr=0.005, lr_schedule="constant"),
        **options,
    )
    held_out = x[TRAINED_ON:], y[TRAINED_ON:]
    # 20 points are the check of the specification (9 f); here seeds 0 and 1 differ by 70 and 74.
    assert accuracy(annealed.model, *held_out) > accuracy(at_once.model, *held_out) + 20


def test_it_goes_on_from_a_checkpoint():
    def fresh():
        model, x = toy("mlp")
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        return model, sgd, sc.Pruner(model, x, method="gibbs", optimizers=sgd, total_steps=40, budget=HALF)

    def train(pruner, optimizer, steps, start=0):
        data = toy_batches("mlp")
        for i in range(start, start + steps):
            inputs, target = data[i % 4]
            optimizer.zero_grad()
            F.cross_entropy(pruner.model(inputs), target).backward()
            optimizer.step()
            pruner.step()

    model, sgd, pruner = fresh()
    train(pruner, sgd, 8)
    again, other_sgd, other = fresh()
    other.load_state_dict(copy.deepcopy(pruner.state_dict()))
    again.load_state_dict(model.state_dict())
    train(pruner, sgd, 20, start=8)
    train(other, other_sgd, 20, start=8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_units_that_are_no_single_weights_are_refused():
    with pytest.raises(NotApplicable, match="granularity='weight'"):
        sc.prune(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            torch.randn(2, 4),
            method="gibbs",
            granularity="channel",
            budget=sc.Budget(macs=0.5),
        )
