from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.methods.taylor import Taylor
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.weight import Weight
from secateur.structure.inputs import Inputs, state_of, undisturbed
from secateur.structure.masked import run_masked
from secateur.testing.toys import TwoLayer


def linear_loss(output, target):
    """A loss that is linear in the output."""
    return (output * target).sum(1).mean()


def problem(seed=0, n=6):
    torch.manual_seed(seed)
    model = TwoLayer(torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)).eval()
    x, target = torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 2, dtype=torch.float64)
    return model, x, target


def test_for_a_linear_loss_the_gate_score_is_the_squared_change_when_the_unit_is_removed():
    model, x, target = problem()
    units = Channel().units(model, x, Scope())
    scores = Taylor().score(sc.Context(units, [(x, target)], linear_loss))["hidden"]
    with undisturbed(model):
        full = linear_loss(model(x), target)
        for j in range(5):
            kept = torch.arange(5) != j
            output = run_masked(model, units.structure, {"hidden": kept}, state_of(model), Inputs((x,), {}))
            assert torch.isclose(scores[j], (linear_loss(output, target) - full) ** 2, rtol=1e-9)


def test_the_gate_score_is_the_squared_derivative_with_respect_to_a_real_gate():
    model, x, target = problem(1)
    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    output = model.head(torch.relu(model.hidden(x)) * gate)
    (derivative,) = torch.autograd.grad(output.pow(3).mul(target).mean(), gate)
    units = Channel().units(model, x, Scope())
    loss = lambda out, y: out.pow(3).mul(y).mean()  # noqa: E731
    scores = Taylor().score(sc.Context(units, [(x, target)], loss))["hidden"]
    assert torch.allclose(scores, derivative**2, rtol=1e-9)


def test_behind_batch_norm_the_gate_equals_the_papers_gate_on_the_normalized_activation():
    """gamma dL/dgamma + beta dL/dbeta, as a gate between BatchNorm and ReLU would see it (specification C2)."""
    torch.manual_seed(0)
    model = (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        .double()
        .eval()
    )
    with torch.no_grad():
        model[1].weight.normal_(1, 0.5)
        model[1].bias.normal_(0, 0.5)
    x, y = torch.randn(7, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (7,))
    g_weight, g_bias = torch.autograd.grad(F.cross_entropy(model(x), y), (model[1].weight, model[1].bias))
    expected = (model[1].weight * g_weight + model[1].bias * g_bias) ** 2
    units = Channel().units(model, x[:1], Scope())
    assert torch.allclose(Taylor().score(sc.Context(units, [(x, y)]))["0"], expected, rtol=1e-8)


def test_scores_are_squared_per_batch_and_then_averaged():
    model, x, target = problem(2)
    units = Channel().units(model, x, Scope())
    score = lambda data: Taylor().score(sc.Context(units, data, linear_loss))["hidden"]  # noqa: E731
    both = score([(x[:3], target[:3]), (x[3:], target[3:])])
    assert torch.allclose(both, (score([(x[:3], target[:3])]) + score([(x[3:], target[3:])])) / 2)
    assert not torch.allclose(both, score([(x, target)]))


def test_a_dead_unit_has_score_zero():
    model, x, target = problem(3)
    with torch.no_grad():
        model.hidden.weight[2] = -x.abs().max() * torch.sign(x).mean(0).sign()
        model.hidden.weight[2] = 0
    units = Channel().units(model, x, Scope())
    for at in ("gate", "weight"):
        scores = Taylor(at=at).score(sc.Context(units, [(x, target)], linear_loss))["hidden"]
        assert scores[2] == 0 and (scores[[0, 1, 3, 4]] > 0).any()


def test_weight_scores_are_hand_computed_and_the_same_for_both_settings_on_single_weights():
    model = TwoLayer(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])).eval()
    x, target = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]])
    # y = 3 relu(w1 + w2) = 9 and L = y: dL/dw = (3, 3), dL/da = 3; w g = (3, 6) and 9
    units = Weight().units(model, x, Scope())
    for at in ("gate", "weight"):
        scores = Taylor(at=at).score(sc.Context(units, [(x, target)], linear_loss))
        assert scores["hidden.weight"].tolist() == [[9, 36]] and scores["head.weight"].tolist() == [[81]]
    channels = Channel().units(model, x, Scope())
    if channels.shapes:  # a single unit is no axis
        raise AssertionError("an axis of one unit must not be prunable")


def test_weight_setting_sums_squares_over_the_whole_unit():
    model, x, target = problem(4)
    units = Channel().units(model, x, Scope())
    context = sc.Context(units, [(x, target)], linear_loss)
    gradients = context.gradients()
    expected = (model.hidden.weight * gradients["hidden.weight"]).pow(2).sum(1)
    expected = expected + (model.head.weight * gradients["head.weight"]).pow(2).sum(0)
    assert torch.allclose(Taylor(at="weight").score(context)["hidden"], expected)


def test_ranks_agree_with_the_oracle_on_a_trained_network():
    """Spearman correlation with the true change of the loss, on real digits (specification C5)."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:900]), y[:900]).backward()
        optimizer.step()
    model.eval()
    held_out = list(zip(x[900:].split(14), y[900:].split(14), strict=True))
    units = Channel().units(model, x[:1], Scope())
    scores = Taylor().score(sc.Context(units, held_out))["2"]
    squared = torch.zeros(100)
    with torch.no_grad():
        for a, b in held_out:
            hidden = model[:4](a)
            full = model[4](hidden)
            without = full[:, None] - hidden[:, :, None] * model[4].weight.T  # (n, removed unit, classes)
            losses = F.cross_entropy(without.flatten(0, 1), b.repeat_interleave(100), reduction="none").view(-1, 100)
            squared += (losses.mean(0) - F.cross_entropy(full, b)) ** 2
    assert spearmanr(squared.tolist(), scores.tolist()).statistic > 0.9
