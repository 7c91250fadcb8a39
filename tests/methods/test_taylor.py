from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from tests.methods.experiments import TRAINED_ON, accuracy, batches, digits, trained_perceptron
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import InvalidRecipe, NotApplicable
from secateur.methods.taylor import Taylor
from secateur.parts.gates import Gates
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.depth import Depth
from secateur.parts.granularity.weight import Weight
from secateur.structure.inputs import Inputs, state_of, undisturbed
from secateur.structure.masked import run_masked
from secateur.testing.toys import TwoLayer, toy, toy_batches

ORACLE = Taylor(order="exact")


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


def test_a_unit_that_its_negative_pre_activation_leaves_dead_has_score_zero():
    model, x, target = problem(3)
    x = x.abs()
    with torch.no_grad():
        model.hidden.weight[2] = -1  # nonzero weights, dead through ReLU (specification C3)
    assert (model.hidden(x)[:, 2] < 0).all()
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


def test_without_fine_tuning_it_ends_above_magnitude_and_random():
    """Specification 4 f: three quarters of the neurons removed in ten rounds, on digits."""
    x, y = digits()
    found = {"taylor": [], "magnitude": [], "random": []}
    for seed in range(3):
        model = trained_perceptron(seed, 64, 100, 100, 10, x=x[:TRAINED_ON], y=y[:TRAINED_ON])
        for method, values in found.items():
            pruned = sc.prune(
                model,
                x[:1],
                method=method,
                granularity="channel",
                allocation="global",
                schedule={"name": "iterative", "steps": 10, "span": 0},
                budget=sc.Budget(sparsity=0.75),
                data=batches(x[:TRAINED_ON], y[:TRAINED_ON]),
                seed=seed,
            )
            values.append(accuracy(pruned.model, x[TRAINED_ON:], y[TRAINED_ON:]))
    taylor, magnitude, chance = (sum(values) / 3 for values in found.values())
    # The specification measured 29 and 49 points and sets no threshold; here it is 29 above both: about half of that.
    assert taylor > magnitude + 15 and taylor > chance + 15


def quadratic_loss(output, target):
    """A loss that is quadratic in the output."""
    return (output - target).square().sum(1).mean()


def test_for_a_quadratic_loss_the_second_order_gate_score_is_the_oracle():
    model, x, target = problem(5)
    units = Channel().units(model, x, Scope())
    data = [(x[:2], target[:2]), (x[2:], target[2:])]
    oracle = ORACLE.score(sc.Context(units, data, quadratic_loss))["hidden"]
    second = Taylor(order=2).score(sc.Context(units, data, quadratic_loss))["hidden"]
    assert torch.allclose(second, oracle, rtol=1e-9)
    assert not torch.allclose(Taylor().score(sc.Context(units, data, quadratic_loss))["hidden"], oracle, rtol=0.1)


@pytest.mark.parametrize(("network", "granularity"), [("resnet20", Channel()), ("vit", Channel()), ("vit", Depth())])
def test_the_second_order_score_agrees_with_finite_differences_by_the_gates(network, granularity):
    model, x = toy(network)
    model, ((inputs, target),) = model.double(), toy_batches(network, n=1, batch_size=3)
    scope = Scope(include=("blocks.[01]*",)) if network == "resnet20" else Scope()
    units = granularity.units(model, x.double(), scope)
    context = sc.Context(units, [(inputs.double(), target)])
    scores, gates, step = Taylor(order=2).score(context), Gates(units), 1e-4

    def loss(group, unit, z):
        gate = torch.ones(units.shapes[group], dtype=torch.float64)
        gate[unit] = z
        with torch.no_grad(), gates.applied({group: gate}):
            return float(F.cross_entropy(model(inputs.double()), target))

    for group, shape in list(units.shapes.items())[:5]:
        unit = shape.numel() - 1
        below, here, above = (loss(group, unit, 1 + d) for d in (-step, 0, step))
        slope, curvature = (above - below) / (2 * step), (above - 2 * here + below) / step**2
        assert scores[group][unit].item() == pytest.approx((slope - curvature / 2) ** 2, rel=1e-3, abs=1e-10)


@pytest.mark.parametrize("at", ["gate", "weight"])
def test_the_second_order_score_of_single_weights_has_one_product_with_the_hessian(at):
    model, x, target = problem(6)
    units = Weight().units(model, x, Scope())
    data = [(x, target)]
    scores = Taylor(at=at, order=2).score(sc.Context(units, data, quadratic_loss))
    weights = {n: w.clone() for n, w in sc.Context(units).weights.items()}
    gradients, step = [], 1e-5
    for factor in (1 - step, 1, 1 + step):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(factor * weights[name])
        gradients.append(sc.Context(units, data, quadratic_loss).gradients())
    below, here, above = gradients
    for name, w in weights.items():
        product = (above[name] - below[name]) / (2 * step)
        torch.testing.assert_close(scores[name], (w * here[name] - w * product / 2) ** 2, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- the oracle


def test_exact_scores_are_hand_computed():
    model = TwoLayer(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 5.0]])).eval()
    x, target = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]])
    # y = 3 * 1 + 5 * 2 = 13 and L = y: without the first unit 10, without the second 3
    units = Channel().units(model, x, Scope())
    scores = ORACLE.score(sc.Context(units, [(x, target), (2 * x, target)], lambda out, y: (out * y).sum(1).mean()))
    assert scores["hidden"].tolist() == [(9 + 36) / 2, (100 + 400) / 2]


@pytest.mark.parametrize(
    ("network", "granularity"), [("resnet20", Channel()), ("squeeze_excite", Channel()), ("vit", Depth())]
)
def test_exact_scores_are_the_change_when_a_unit_is_absent(network, granularity):
    """Brute force: the loss of the dense network in which one unit takes no part, as cuts are proved with."""
    model, (data,) = toy(network)[0].double(), toy_batches(network, n=1, batch_size=4)
    inputs, target = data[0].double(), data[1]
    scope = Scope(include=("blocks.[01]*",)) if network == "resnet20" else Scope()
    units = granularity.units(model, inputs, scope)
    scores = ORACLE.score(sc.Context(units, [(inputs, target)]))
    whole = {name: torch.ones(shape).bool() for name, shape in units.shapes.items()}
    with undisturbed(model):
        full = F.cross_entropy(model(inputs), target)
        for group, shape in units.shapes.items():
            for unit in range(0, shape.numel(), 3):
                kept = {**whole, group: torch.arange(shape.numel()) != unit}
                output = run_masked(model, units.structure, units.by_name(kept), state_of(model), Inputs((inputs,), {}))
                expected = (F.cross_entropy(output, target) - full) ** 2
                torch.testing.assert_close(scores[group][unit], expected, rtol=1e-5, atol=1e-12)


def test_a_unit_that_nothing_depends_on_has_the_exact_score_zero_and_single_weights_are_refused():
    model, x = toy("mlp")
    model = copy.deepcopy(model)
    with torch.no_grad():
        model[3].weight[:, 7] = 0
    scores = ORACLE.score(sc.Context(Channel().units(model, x, Scope()), toy_batches("mlp")))["1"]
    assert scores[7] == 0 and scores.count_nonzero() == 31
    with pytest.raises(InvalidRecipe, match="at gates"):
        Taylor(order="exact", at="weight")
    with pytest.raises(NotApplicable, match="choose such a granularity"):
        ORACLE.score(sc.Context(Weight().units(model, x, Scope()), toy_batches("mlp")))
