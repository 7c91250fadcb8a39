"""The condition for convergence where it is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.measure.trainability import trainability


def test_trainability_of_a_linear_model_is_known():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, dtype=torch.float64), {"w": torch.randn(8, dtype=torch.float64)}
    target = torch.zeros(3, dtype=torch.float64)
    found = trainability(lambda p: x @ p["w"], weight, target)
    assert found.smallest == pytest.approx(float(torch.linalg.svdvals(x)[-1]))
    assert found.residual == pytest.approx(float((x @ weight["w"]).norm()))
    assert found.curvature < 1e-9 and found.ratio < 1 and found.rate == found.smallest**2 / 2
    mask = {"w": torch.tensor([1, 1, 1, 1, 1, 0, 0, 0], dtype=torch.float64)}
    masked = trainability(lambda p: x @ p["w"], weight, target, mask)
    assert masked.smallest == pytest.approx(float(torch.linalg.svdvals(x[:, :5])[-1]))
    assert masked.smallest < found.smallest


def test_fewer_parameters_than_outputs_cannot_reach_every_target():
    x, weight = torch.eye(5, 2, dtype=torch.float64), {"w": torch.ones(2, dtype=torch.float64)}
    found = trainability(lambda p: x @ p["w"], weight, torch.ones(5, dtype=torch.float64))
    assert found.smallest == 0 and found.rate == 0


def test_a_wider_network_is_more_trainable():
    ratios = []
    for width in (64, 1024):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, width, bias=False), nn.Tanh(), nn.Linear(width, 2, bias=False)).double()
        state = {"0.weight": net[0].weight.detach() * 2}
        x = nn.functional.normalize(torch.randn(1, 4, dtype=torch.float64))
        call = lambda p, net=net, x=x: torch.func.functional_call(net, dict(p), (x,))  # noqa: E731
        ratios.append(trainability(call, state, torch.ones(1, 2, dtype=torch.float64)).ratio)
    assert ratios[1] < ratios[0]
