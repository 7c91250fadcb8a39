from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, NotApplicable
from secateur.methods.grasp import Grasp
from secateur.parts.granularity.weight import Weight


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 10)).double()
    data = [(torch.randn(n, 64, dtype=torch.float64), torch.randint(0, 10, (n,))) for n in (40, 60)]
    return model, data


def context_of(model, data, **options):
    return sc.Context(Weight().units(model, data[0][0], Scope()), data, **options)


def gradient_norm(model, data):
    """The squared norm of the gradient of the plain loss."""
    return sum(float(g.square().sum()) for g in context_of(model, data).gradients().values())


def test_scores_are_hand_computed_for_a_quadratic_loss():
    """y = w x, L = (y - t)²/2: g = (y - t) x, H g = x (x x) (y - t)."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0]]))
    x, target = torch.tensor([[3.0, 1.0]]), torch.tensor([[-1.0]])
    # y - t = 3 - 2 + 1 = 2, x x = 10, H g = (60, 20)
    loss = lambda output, t: 0.5 * (output - t).square().sum()  # noqa: E731
    scores = Grasp(temperature=None).score(context_of(model, [(x, target)], loss=loss))
    assert scores["weight"].tolist() == [[60, -40]]
    # without the first weight g falls from 2 x to -x: a first-order estimate of -2 * 60 for the true 10 - 40
    torch.testing.assert_close(scores["weight"].sum(), torch.tensor(20.0))  # theta H g


def test_the_hessian_gradient_product_equals_finite_differences():
    model, data = network()
    context = context_of(model, data, loss=lambda output, y: F.cross_entropy(output / 200, y))
    gradients, weights, step = context.gradients(), context.weights, 1e-2
    ahead = context.but(values={n: w + step * gradients[n] for n, w in weights.items()}).gradients()
    behind = context.but(values={n: w - step * gradients[n] for n, w in weights.items()}).gradients()
    expected = {n: weights[n] * (ahead[n] - behind[n]) / (2 * step) for n in weights}
    found = Grasp().score(context_of(model, data))
    size = sum(float(e.abs().sum()) for e in expected.values())
    assert sum(float((found[n] - e).abs().sum()) for n, e in expected.items()) < 1e-7 * size


def test_the_end_that_is_removed_is_the_one_that_hinders_the_gradient():
    model, data = network()
    scores = Grasp().score(context_of(model, data))
    flat = torch.cat([values.flatten() for values in scores.values()])
    threshold = flat.kthvalue(int(0.3 * flat.numel())).values
    upper = flat.kthvalue(int(0.7 * flat.numel())).values

    def without(removed):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if name in scores:
                    parameter[removed(scores[name])] = 0
        return gradient_norm(other, data)

    dense = gradient_norm(model, data)
    worst, best = without(lambda s: s <= threshold), without(lambda s: s > upper)
    assert worst > 2 * dense and best < 0.5 * dense
    pruned = sc.prune(model, data[0][0], method="grasp", budget=sc.Budget(sparsity=0.3), data=data)
    assert gradient_norm(pruned.model, data) == pytest.approx(worst, rel=0.05)
    random = sc.prune(model, data[0][0], method="random", budget=sc.Budget(sparsity=0.3))
    assert best < gradient_norm(random.model, data) < worst


def test_two_passes_over_the_data_and_one_clear_error_without():
    model, data = network()
    context = context_of(model, data)
    Grasp().score(context)
    assert context.samples_used == 200
    with pytest.raises(DataNeeded):
        sc.prune(model, data[0][0], method="grasp", budget=sc.Budget(sparsity=0.5))
    real = [(x, torch.randn(len(x), 10)) for x, _ in data]
    with pytest.raises(NotApplicable, match="temperature"):
        sc.prune(model, data[0][0], method="grasp", budget=sc.Budget(sparsity=0.5), data=real)


def test_in_a_loop_of_the_users_own():
    model, data = network()
    init = copy.deepcopy(model.state_dict())
    expected = sc.prune(model, data[0][0], method="grasp", budget=sc.Budget(sparsity=0.5), data=data).masks
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(
        model, data[0][0], optimizers=sgd, total_steps=1, method="grasp", budget=sc.Budget(sparsity=0.5), data=data
    )
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    sgd.step()
    pruner.step()
    assert all(torch.equal(model.state_dict()[n], init[n] * m) for n, m in expected.items())
