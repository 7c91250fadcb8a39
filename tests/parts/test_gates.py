"""Gates: factors where units are consumed, and gradients by them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.core.context import Context
from secateur.core.recipe import Recipe
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.parts.gates import Gates, gate_gradients
from secateur.testing.toys import NETWORKS, toy, toy_batches


def units_of(network, granularity="channel"):
    model, x = toy(network)
    recipe = Recipe(criterion="magnitude", granularity=granularity)
    return recipe.granularity.units(copy.deepcopy(model).eval(), x, Scope()), x


@pytest.mark.parametrize("network", NETWORKS)
def test_the_mean_gradient_by_the_gates_is_the_sum_of_weight_times_gradient(network):
    units, _ = units_of(network)
    data = toy_batches(network)
    context = Context(units, data)
    weights, gradients = context.weights, list(context.gradient_batches())
    for gradient, slopes in zip(gradients, gate_gradients(Context(units, data)), strict=True):
        expected = units.sum({name: weights[name] * gradient[name] for name in weights}, consumed=True)
        for group, values in expected.items():
            torch.testing.assert_close(slopes[group].mean(0), values, rtol=1e-3, atol=1e-6)


def test_each_sample_has_the_gradient_that_it_has_alone():
    units, _ = units_of("mlp")
    ((inputs, target),) = toy_batches("mlp")[:1]
    together = next(gate_gradients(Context(units, [(inputs, target)])))
    alone = [next(gate_gradients(Context(units, [(inputs[i : i + 1], target[i : i + 1])]))) for i in range(3)]
    for group, values in together.items():
        torch.testing.assert_close(values[:3], torch.cat([one[group] for one in alone]), rtol=1e-4, atol=1e-7)


def test_a_gate_of_zero_removes_the_unit_and_is_gone_afterwards():
    units, x = units_of("mlp")
    model = units.model
    dense = model(x)
    gone = copy.deepcopy(model)
    with torch.no_grad():
        gone[3].weight[:, ::2] = 0
    gate = torch.ones(units.shapes["1"])
    gate[::2] = 0
    with Gates(units).applied({"1": gate}):
        torch.testing.assert_close(model(x), gone(x))
    assert torch.equal(model(x), dense) and not torch.allclose(dense, gone(x))


def test_gates_per_sample_act_on_their_own_sample():
    units, x = units_of("mlp")
    x = torch.cat([x, x])[:2]
    gates = torch.ones(2, units.shapes["1"].numel())
    gates[1] = 0
    with Gates(units).applied({"1": gates}):
        out = units.model(x)
    torch.testing.assert_close(out[0], units.model(x)[0])
    torch.testing.assert_close(out[1], units.model[3:](torch.zeros(1, units.model[1].out_features))[0])


@pytest.mark.parametrize(
    ("network", "granularity"), [*((n, "channel") for n in NETWORKS), ("vit", "depth"), ("resnet20", "depth")]
)
def test_folded_gates_do_what_the_gates_did(network, granularity):
    units, x = units_of(network, granularity)
    model, x = units.model.double(), x.double()
    gates = {group: torch.rand(shape, dtype=torch.double) for group, shape in units.shapes.items()}
    with Gates(units).applied(gates):
        gated = model(x)
    assert not torch.allclose(gated, model(x))
    Gates(units).fold(gates)
    torch.testing.assert_close(model(x), gated)


def test_grouped_transposed_convolutions_read_gated_units():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2)).double()
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    units = Recipe(criterion="magnitude", granularity="channel").granularity.units(model, x, Scope())
    gates = {group: torch.rand(shape, dtype=torch.double) for group, shape in units.shapes.items()}
    with Gates(units).applied(gates):
        gated = model(x)
    assert gates and not torch.allclose(gated, model(x))
    Gates(units).fold(gates)
    torch.testing.assert_close(model(x), gated)


class SharedReaders(nn.Module):
    """Two layers read the units by one weight, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.third.weight = self.second.weight

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.second(hidden).sigmoid() + self.third(hidden.square())


class SharedProducers(nn.Module):
    """Queries and keys are made by one weight, each with a bias of its own, and no layer reads them."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 3)
        self.key.weight = self.query.weight

    def forward(self, x):
        attention = self.query(x) @ self.key(x).mT
        return attention.softmax(-1) @ self.value(x)


@pytest.mark.parametrize("network", [SharedReaders, SharedProducers])
def test_layers_that_share_a_weight_are_gated_together(network):
    torch.manual_seed(0)
    model = network().double()
    x, target = torch.randn(2, 5, 4, dtype=torch.double), torch.randn(2, 5, 3, dtype=torch.double)
    units = Recipe(criterion="magnitude", granularity="channel").granularity.units(model.eval(), x, Scope())
    ((group, shape),) = units.shapes.items()
    state = copy.deepcopy(model.state_dict())

    def folded(values):
        Gates(units).fold({group: values})
        output = model(x)
        model.load_state_dict(state)
        return output

    gate = torch.rand(shape, dtype=torch.double)
    with Gates(units).applied({group: gate}):
        gated = model(x)
    torch.testing.assert_close(gated, folded(gate))

    slopes = next(gate_gradients(Context(units, [(x, target)], loss=F.mse_loss)))[group].mean(0)
    for unit, slope in enumerate(slopes):
        step = 1e-5 * F.one_hot(torch.tensor(unit), shape.numel()).double()
        after, before = (F.mse_loss(folded(1 + change), target).item() for change in (step, -step))
        assert slope.item() == pytest.approx((after - before) / 2e-5, rel=1e-6, abs=1e-9)


def test_units_that_are_no_axes_and_layers_without_a_place_are_refused():
    with pytest.raises(NotApplicable, match="Gates stand at channels"):
        Gates(units_of("mlp", "weight")[0])

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.LSTM(6, 3, batch_first=True)

        def forward(self, x):
            return self.second(F.relu(self.first(x)))[0]

    channel = Recipe(criterion="magnitude", granularity="channel").granularity
    units = channel.units(Reader(), torch.randn(2, 5, 4), Scope())
    with pytest.raises(NotApplicable, match="read by a LSTM"):
        Gates(units)


def test_gates_may_change_while_they_are_applied_and_gradients_reach_them_again_and_again():
    units, x = units_of("mlp")
    gate = torch.ones(units.shapes["1"], requires_grad=True)
    with Gates(units).applied({"1": gate}):
        for value in (1.0, 0.0):
            with torch.no_grad():
                gate.fill_(value)
            out = units.model(x)
            torch.autograd.grad(out.square().sum(), gate)
    torch.testing.assert_close(out, units.model[3:](torch.zeros(len(x), units.model[1].out_features)))
