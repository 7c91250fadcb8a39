from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.context import Context
from secateur.core.layers import input_rows, output_rows, weight_matrix
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, NotApplicable
from secateur.methods.fusion import FusionError
from secateur.parts.fusion import fused, fused_gaussian, gaussian_moments
from secateur.parts.granularity.depth import Depth
from secateur.parts.least_squares import Moments
from secateur.testing.toys import NETWORKS, toy, toy_batches

DOUBLE = torch.float64


def moments_of(*rows):
    joint = Moments()
    joint.add(torch.cat(rows, -1)[None] if rows[0].dim() == 2 else torch.cat(rows, -1))
    return joint


def pair(n=4000, seed=0):
    """The setting of the specification: 20 correlated inputs, 64 rectified units, 10 outputs, biases."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=DOUBLE, generator=g)  # noqa: E731
    mix, mean = draw(20, 20) / 20**0.5, draw(20) / 2
    a0 = draw(n, 20) @ mix.T + mean
    first, second = (draw(64, 20) / 20**0.5, draw(64) / 2), (draw(10, 64) / 8, draw(10))
    return a0, mean, mix @ mix.T, first, second


def error(a0, z2, weight, bias):
    return float((a0 @ weight.T + bias - z2).square().sum() / (z2 - z2.mean(0)).square().sum())


def test_the_residual_is_orthogonal_to_the_inputs_and_has_no_mean():
    a0, _, _, (w1, b1), (w2, b2) = pair(500)
    a1 = (a0 @ w1.T + b1).relu()
    found = fused(moments_of(a0, a1), w2[None], b2[None], ridge=0.0)
    residual = a0 @ found.weight[0].T + found.bias[0] - (a1 @ w2.T + b2)
    assert residual.mean(0).abs().max() < 1e-10
    assert (residual.T @ (a0 - a0.mean(0)) / 500).abs().max() < 1e-8
    assert found.error == pytest.approx(float(residual.square().sum(1).mean()), rel=1e-9)
    assert 0 < found.relative_error < 1
    assert found.relative_error == pytest.approx(error(a0, a1 @ w2.T + b2, found.weight[0], found.bias[0]))


def test_without_a_nonlinearity_it_is_the_product_of_the_layers():
    a0, mean, covariance, (w1, b1), (w2, b2) = pair(500)
    found = fused(moments_of(a0, a0 @ w1.T + b1), w2[None], b2[None], ridge=0.0)
    closed = fused_gaussian((w1, b1), (w2, b2), mean, covariance, lambda z: z)
    for weight, bias in ((found.weight[0], found.bias[0]), closed):
        torch.testing.assert_close(weight, w2 @ w1, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(bias, w2 @ b1 + b2, rtol=1e-6, atol=1e-6)
    assert found.relative_error < 1e-12


def test_for_gaussian_inputs_no_data_are_needed():
    a0, mean, covariance, (w1, b1), (w2, b2) = pair(100_000)
    a1 = (a0 @ w1.T + b1).relu()
    z2 = a1 @ w2.T + b2
    best = fused(moments_of(a0, a1), w2[None], b2[None], ridge=0.0).relative_error
    weight, bias = fused_gaussian((w1, b1), (w2, b2), mean, covariance)
    assert abs(error(a0, z2, weight, bias) - best) < 1e-3
    product = w2 @ w1
    assert error(a0, z2, product, w2 @ b1 + b2) > 1 > best  # worse than predicting the mean
    half = error(a0, z2, product / 2, z2.mean(0) - product @ a0.mean(0) / 2)
    assert best < half < 1


def test_moments_of_activations_are_exact():
    mean, spread = torch.tensor([-1.0, 0.0, 2.0, 0.7], dtype=DOUBLE), torch.tensor([0.5, 1.0, 3.0, 0.0], dtype=DOUBLE)
    value, slope = gaussian_moments(mean, spread, torch.relu)
    z = mean + spread * torch.randn(100_000, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(value, z.relu().mean(0), rtol=0.02, atol=0.01)
    torch.testing.assert_close(slope, (z > 0).double().mean(0), rtol=0.02, atol=0.01)
    value, slope = gaussian_moments(mean, spread, torch.tanh)
    torch.testing.assert_close(value, z.tanh().mean(0), rtol=0.02, atol=0.01)
    torch.testing.assert_close(slope, (1 - z.tanh().square()).mean(0), rtol=0.02, atol=0.01)
    assert float(slope[3]) == pytest.approx(1 - float(torch.tanh(mean[3])) ** 2)


def test_convolutions_are_fused_on_patches():
    """Two 3x3 convolutions without anything between are one of 5x5, away from the border; 1x1 ones are dense layers."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 4, 3).to(DOUBLE), nn.Conv2d(4, 3, 3, stride=2).to(DOUBLE)
    one = nn.Conv2d(2, 3, 5, stride=2).to(DOUBLE)
    x = torch.randn(6, 2, 13, 13, dtype=DOUBLE)
    with torch.no_grad():
        a1 = first(x)
        joint = moments_of(input_rows(one, x), input_rows(second, a1))
        found = fused(joint, weight_matrix(second), second.bias[None], ridge=0.0)
        assert found.relative_error < 1e-12
        out = input_rows(one, x)[0] @ found.weight[0].T + found.bias[0]
        torch.testing.assert_close(out, output_rows(second, second(a1))[0])
        dots = nn.Conv2d(2, 4, 1).to(DOUBLE), nn.Conv2d(4, 3, 1).to(DOUBLE)
        a1 = dots[0](x).relu()
        joint = moments_of(input_rows(dots[0], x), input_rows(dots[1], a1))
        pixels = lambda t: t.permute(0, 2, 3, 1).flatten(0, 2)  # noqa: E731
        dense = moments_of(pixels(x), pixels(a1))
        as_dense = fused(dense, dots[1].weight.flatten(1)[None], dots[1].bias[None])
        torch.testing.assert_close(fused(joint, weight_matrix(dots[1]), dots[1].bias[None]).weight, as_dense.weight)


# ------------------------------------------------------------------------------------------- dropped branches


class Stream(nn.Module):
    def __init__(self, blocks, bias=True):
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=bias) for _ in range(blocks))
        self.head = nn.Linear(4, 3, bias=bias)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def stream(blocks=3, bias=True):
    torch.manual_seed(0)
    model = Stream(blocks, bias).to(DOUBLE)
    return model, [(torch.randn(30, 5, dtype=DOUBLE), None) for _ in range(3)]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_branches_are_taken_over_exactly(bias, tmp_path):
    model, data = stream(bias=bias)
    options = {"granularity": "depth", "data": data, "budget": sc.Budget(sparsity=2 / 3)}
    exact = {"name": "fusion", "ridge": 0}
    repaired = sc.prune(model, data[0][0], method="fusion", repair=exact, **options)
    assert len(repaired.structure_plan.dropped) == 2
    torch.testing.assert_close(repaired.model(data[1][0]), model(data[1][0]), rtol=1e-7, atol=1e-7)
    plain = sc.prune(model, data[0][0], method="fusion", repair="none", **options)
    assert (plain.model(data[1][0]) - model(data[1][0])).abs().max() > 0.1
    sc.save(repaired, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", lambda: Stream(3, bias).to(DOUBLE))
    assert torch.equal(again(data[0][0]), repaired.model(data[0][0]))


@pytest.mark.parametrize("network", ["resnet20", "vit"])
def test_outputs_change_less_than_when_branches_are_only_dropped(network, tmp_path):
    model, x = toy(network)
    data = toy_batches(network, n=2, batch_size=16)
    inputs = torch.cat([x for x, _ in data])
    options = {"granularity": "depth", "data": data, "budget": sc.Budget(macs=0.8), "method": "magnitude"}
    change = lambda pruned: float((pruned.model(inputs) - model(inputs)).square().mean().detach())  # noqa: E731
    repaired = sc.prune(model, x, repair="fusion", **options)
    assert change(repaired) < 0.7 * change(sc.prune(model, x, **options))
    assert repaired.after.macs <= 0.8 * repaired.before.macs
    sc.save(repaired, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", build=NETWORKS[network][0])
    assert torch.equal(again(x), repaired.model(x))


def test_scores_are_the_errors_of_the_best_stand_in():
    torch.manual_seed(0)

    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer, self.last = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = x + self.outer(self.inner(x).relu())
            return self.head(x + self.last(x))

    model = Bent().to(DOUBLE)
    x = torch.randn(60, 4, dtype=DOUBLE)
    units = Depth().units(model, x, Scope())
    context = Context(units, x.split(20))
    scores = FusionError(ridge=0.0).score(context)
    bent, straight = (float(s) for s in scores.values())
    with torch.no_grad():
        a1 = x + model.outer(model.inner(x).relu())
        expected = fused(moments_of(x, a1), model.last.weight[None], model.last.bias[None], 0.0).relative_error
    assert bent == pytest.approx(expected) and 0.001 < bent < 1 and straight < 1e-12
    assert context.samples_used == 2 * 60


def test_what_cannot_be_fused_is_said():
    model, x = toy("mlp")
    options = {"data": toy_batches("mlp"), "budget": sc.Budget(sparsity=0.5)}
    with pytest.raises(NotApplicable, match="granularity 'depth'"):
        sc.prune(model, x, method="fusion", granularity="channel", **options)
    with pytest.raises(NotApplicable, match="granularity 'depth'"):
        sc.prune(model, x, method="magnitude", granularity="channel", repair="fusion", **options)
    deep, data = stream()
    with pytest.raises(DataNeeded):
        sc.prune(deep, data[0][0], method="fusion", budget=sc.Budget(sparsity=0.3))
