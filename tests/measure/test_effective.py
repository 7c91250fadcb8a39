from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure.effective import effective_params
from secateur.testing.toys import resnet20


@pytest.fixture
def net():
    """4 inputs, 3 and 3 hidden units, 2 outputs, no zeros."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    return model


def count(model):
    return effective_params(model, torch.zeros(1, 4))


def test_without_zeros_every_parameter_has_an_effect(net):
    assert count(net) == 4 * 3 + 3 + 3 * 3 + 3 + 3 * 2 + 2 == 35


@torch.no_grad()
def test_a_unit_that_gives_nothing_takes_its_inputs_with_it(net):
    net[4].weight[:, 0] = 0  # 2 zeros; its 3 weights in and its bias have no effect
    assert count(net) == 35 - 2 - 3 - 1


@torch.no_grad()
def test_a_unit_that_gets_nothing_takes_its_outputs_with_it(net):
    net[0].weight[1] = 0  # 4 zeros; its 3 weights out and its bias have no effect
    assert count(net) == 35 - 4 - 3 - 1


@torch.no_grad()
def test_death_spreads_along_paths(net):
    net[0].weight[0] = 0
    net[2].weight[1, 1:] = 0  # unit 1 of the second layer hears only unit 0 of the first, which hears nothing
    # first layer: 4 + 1; second: column 0 (3), row 1 (2 more), bias 1; third: column 1 (2)
    assert count(net) == 35 - 5 - 3 - 2 - 1 - 2


@torch.no_grad()
def test_a_residual_stream_lives_as_long_as_one_writer_and_one_reader():
    torch.manual_seed(0)
    model = resnet20().eval()
    whole = effective_params(model, torch.zeros(1, 3, 16, 16))
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert whole == sum(p.numel() for p in model.parameters()) - zeros
    pruned = sc.prune(model, torch.zeros(1, 3, 16, 16), method="random", budget=sc.Budget(sparsity=0.97)).model
    effective = effective_params(pruned, torch.zeros(1, 3, 16, 16))
    assert effective < sum(int((p != 0).sum()) for p in pruned.parameters())
