"""The condition for convergence where it is known, and against Jacobians that are written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InvalidInputs, NotApplicable, NothingPrunable, PlanMismatch
from secateur.measure import trainability as module
from secateur.tasks.networks import ResNet


def linear(weight):
    net = nn.Linear(*reversed(weight.shape), bias=False)
    net.weight = nn.Parameter(weight)
    return net


class Root(nn.Linear):
    """sqrt(w x), which has no slope at 0."""

    def __init__(self):
        super().__init__(1, 1, bias=False)

    def forward(self, x):
        return super().forward(x).sqrt()


def jacobian(net, x):
    """Rows of the Jacobian, one backward pass each."""
    rows = [torch.autograd.grad(y, list(net.parameters()), retain_graph=True) for y in net(x).flatten()]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def test_a_linear_model_is_known():
    torch.manual_seed(0)
    x, net = torch.randn(3, 8, dtype=torch.float64), linear(torch.randn(1, 8, dtype=torch.float64))
    target = torch.zeros(3, 1)
    found = sc.trainability(net, x, target)
    assert found.smallest == pytest.approx(float(torch.linalg.svdvals(x)[-1]))
    assert found.residual == pytest.approx(float(net(x).detach().norm()))
    assert found.curvature < 1e-9 and found.ratio < 1 and found.holds and found.rate == found.smallest**2 / 2
    assert "holds" in found.verdict and "no proof" in found.verdict and f"exp(-{found.rate:.2g} t)" in found.verdict
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    masked = sc.trainability(net, x, target, masks={"weight": mask})
    assert masked.smallest == pytest.approx(float(torch.linalg.svdvals(x[:, :5])[-1]))
    assert masked.residual == pytest.approx(float((x[:, :5] @ net.weight.detach()[0, :5]).norm()))
    assert masked.smallest < found.smallest


def test_the_curvature_of_a_product_of_two_weights_is_its_input():
    # J = x (b, a) for the output x a b: it changes by |x| times the distance, in every direction
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    found = sc.trainability(net, torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    a, b = (layer.weight.item() for layer in net)
    assert found.curvature == pytest.approx(3) and found.smallest == pytest.approx(3 * (a * a + b * b) ** 0.5)
    assert found.ratio == pytest.approx(4 * abs(3 * a * b - 1) * 3 / (9 * (a * a + b * b)))


def test_fewer_weights_than_outputs_cannot_reach_every_target():
    net, x = linear(torch.ones(1, 8)), torch.eye(5, 8)
    assert sc.trainability(net, x, torch.ones(5, 1)).smallest == pytest.approx(1)
    few = {"weight": torch.arange(8)[None] < 2}
    found = sc.trainability(net, x, torch.ones(5, 1), masks=few)
    assert found.smallest == 0 and found.ratio == math.inf and not found.holds and "does not hold" in found.verdict


def test_a_frozen_weight_is_masked_too():
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 1, bias=False))
    net[0].requires_grad_(False)
    found = sc.trainability(net, torch.randn(1, 4), torch.ones(1, 1), masks={"0.weight": torch.zeros(8, 4)})
    assert found.smallest == 0 and found.residual == 1


def test_a_target_out_of_reach_fails_the_condition():
    # The descent saturates tanh on the way that the theory lets the weights go; a change of J by more than half of
    # `smallest` there is a ratio above 1. Random directions hardly touch the input's own, and alone they pass it.
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(100, 1, bias=False), nn.Tanh()), torch.randn(1, 100)
    with torch.no_grad():
        net[0].weight.mul_(0.1)
    far, near = (sc.trainability(net, x, torch.tensor([[target]])) for target in (3.0, 0.1))
    assert not far.holds and "does not hold" in far.verdict
    way = 2 * far.residual / far.smallest
    assert far.curvature >= (far.smallest - jacobian_at(net, x, far, way)) / way > far.smallest / 2 / way
    assert near.holds and "by an estimate" in near.verdict


def jacobian_at(net, x, found, way):
    """Norm of the gradient of tanh(w x) after a way towards a target above."""
    return x.norm().item() * (1 - math.tanh(net[0](x).item() + way * x.norm().item()) ** 2)


def test_contradictory_targets_of_the_same_samples_fail_the_condition():
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(5, 50).repeat(2, 1)
        found = sc.trainability(nn.Linear(50, 1), x, torch.randn(10, 1), seed=seed, directions=1)
        assert found.smallest == 0 and not found.holds


@pytest.mark.parametrize("component", [0.0, 1e-6, 1e-4, 1e-2, 1.0])
def test_a_start_that_all_but_misses_the_smallest_singular_value_finds_it(component):
    values = torch.ones(400, dtype=torch.float64)
    values[7] = 1e-3
    generator = torch.Generator().manual_seed(0)
    diagonal = module._Map(lambda w: values * w["w"], lambda v: {"w": values * v})
    starts = [torch.randn(400, generator=generator, dtype=torch.float64) for _ in range(60)]
    starts[0][7] = component
    drawn = iter(starts)
    found = module._singular_value(diagonal, lambda like: next(drawn), values, largest=False)
    assert found == pytest.approx(1e-3)


def test_a_wider_network_is_more_trainable():
    ratios = []
    for width in (64, 1024):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, width, bias=False), nn.Tanh(), nn.Linear(width, 2, bias=False))
        net[2].requires_grad_(False)
        x = nn.functional.normalize(torch.randn(1, 4))
        ratios.append(sc.trainability(net, x, torch.ones(1, 2)).ratio)
    assert ratios[1] < ratios[0]


def test_a_small_singular_value_is_that_of_the_whole_jacobian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    values = torch.linalg.svdvals(jacobian(net, x))
    found = sc.trainability(net, x, torch.zeros(12, 5), directions=1)
    assert values[0] > 50 * values[-1] and found.smallest == pytest.approx(float(values[-1]), rel=1e-3)


def test_a_residual_network_with_batch_normalization_fits_and_is_left_as_it_was():
    torch.manual_seed(0)
    net, x = ResNet(20, 16), torch.randn(2, 1, 12, 12)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    found = sc.trainability(net, x, torch.zeros(2, 10), directions=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()) and net.training
    assert torch.equal(torch.get_rng_state(), state) and net.fc.weight.grad is None
    values = torch.linalg.svdvals(jacobian(net.double(), x.double()))
    assert found.smallest == pytest.approx(float(values[-1]), rel=1e-3)


def test_attention_and_dropout_have_one_jacobian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True), nn.Linear(8, 1))
    x = torch.randn(2, 3, 8)
    found = [sc.trainability(net, x, torch.zeros(2, 3, 1), directions=1) for _ in range(2)]
    assert found[0] == found[1] and found[0].smallest > 0


def test_what_cannot_be_done_is_one_clear_line(monkeypatch):
    net, x = nn.Linear(30, 2), torch.randn(6, 30) * torch.logspace(0, -2, 30)
    with pytest.raises(InvalidInputs, match=r"shape \(6,\), the output \(6, 2\).*one_hot"):
        sc.trainability(net, x, torch.zeros(6))
    with pytest.raises(PlanMismatch, match="'gone'"):
        sc.trainability(net, x, torch.zeros(6, 2), masks={"gone": torch.ones(2, 30)})
    with pytest.raises(InvalidInputs, match="directions must be at least 1; got 0"):
        sc.trainability(net, x, torch.zeros(6, 2), directions=0)
    for inputs, target in ((x * math.nan, torch.zeros(6, 2)), (x, torch.full((6, 2), math.inf))):
        with pytest.raises(InvalidInputs, match="NaN or infinity"):
            sc.trainability(net, inputs, target)
    with pytest.raises(InvalidInputs, match="returns tuple.*Wrap"):
        sc.trainability(nn.LSTM(30, 2), x, torch.zeros(6, 2))
    with pytest.raises(NotApplicable, match="Jacobian has NaN"):
        sc.trainability(Root(), torch.zeros(1, 1), torch.ones(1, 1))
    monkeypatch.setattr(module, "MOST_PRODUCTS", 3)
    with pytest.raises(NotApplicable, match="12 outputs: 3 products"):
        sc.trainability(net, x, torch.zeros(6, 2))
    with pytest.raises(NothingPrunable, match="requires gradients"):
        sc.trainability(net.requires_grad_(False), x, torch.zeros(6, 2))
