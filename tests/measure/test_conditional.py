"""What networks with gates take: at most, by hand, and for each sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.slots import Scope
from secateur.measure.conditional import Wiring
from secateur.measure.profile import macs_per_sample
from secateur.parts.granularity.channel_per_input import ChannelPerInput
from secateur.tasks.networks import build_network


def gated(model, x, winners=None, deviation=0.3, **scope):
    units = ChannelPerInput().units(model.eval(), x, Scope(**scope))
    for path, gate in units.gates.items():
        gate.winners = (winners or {}).get(path, gate.winners)
        nn.init.normal_(gate.saliency.weight, std=deviation)
        nn.init.uniform_(gate.saliency.bias, 0.5, 1.5)
    return units


def two_layers():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


FIRST = 8 * 8 * 9 * 3 * 2 + 3 * 4
"""All three input channels are read, two of four are computed, and four saliencies are predicted."""
SECOND = 4 * 4 * 9 * 2 * 3 + 4 * 8
HEAD = 8 * 10


def test_macs_by_hand():
    x = torch.randn(1, 3, 8, 8)
    model = two_layers()
    dense = sc.profile(model, x).macs
    units = gated(model, x, {"0": 2, "3": 3})
    counts = sc.profile(model, x)
    assert counts.effective_macs == FIRST + SECOND + HEAD
    assert counts.macs == dense + 3 * 4 + 4 * 8  # a dense engine computes everything
    cost = cost_of("macs")(units)
    assert cost({"0": 2, "3": 3}) == pytest.approx(FIRST + SECOND + HEAD)
    assert cost({"0": 4, "3": 8}) == dense  # without gates there is nothing to predict
    assert 3 * sc.profile(model, x).effective_macs == sc.profile(model, x.repeat(3, 1, 1, 1)).effective_macs


def test_no_sample_takes_more_and_zeros_take_less():
    x = torch.randn(1, 3, 8, 8)
    model = two_layers()
    units = gated(model, x, {"0": 2, "3": 3}, deviation=0)
    samples = torch.cat([x, torch.zeros_like(x)])
    nothing = 3 * 4 + 4 * 8 + HEAD
    exact, without_input = macs_per_sample(model, samples).tolist()
    assert exact == FIRST + SECOND + HEAD
    assert nothing < without_input <= exact - 8 * 8 * 9 * 3 * 2  # the first convolution reads nothing
    nn.init.constant_(units.gates["3"].saliency.bias, -1)
    assert macs_per_sample(model, x).tolist() == [FIRST + 4 * 8 + HEAD]


def test_a_residual_stream_is_the_union_of_what_its_gates_let_through():
    x = torch.randn(1, 3, 16, 16)
    model = build_network("resnet8", 8, 16, 3)
    units = gated(model, x)
    wiring = Wiring(model, x)
    reads = wiring.reads(dict.fromkeys(units.gates, 3))
    assert reads["conv1"] == 3  # the image
    assert reads["blocks.0.conv1"] == 3 and reads["blocks.0.conv2"] == 3
    assert reads["blocks.1.conv1"] == reads["blocks.1.shortcut.0"] == 6  # those of conv1, and of blocks.0.conv2
    assert reads["blocks.1.conv2"] == 3 and reads["blocks.2.conv1"] == 6
    everything = wiring.reads({path: gate.convolution.out_channels for path, gate in units.gates.items()})
    assert everything == {path: gate.convolution.in_channels for path, gate in units.gates.items()}


@pytest.mark.parametrize("density", [0.25, 0.5, 0.9])
def test_the_bound_holds_for_every_sample(density):
    x = torch.randn(16, 3, 16, 16)
    model = build_network("resnet8", 8, 16, 3)
    sizes = {"conv1": 8, **{f"blocks.{i}.conv{j}": 8 * 2**i for i in range(3) for j in (1, 2)}}
    gated(model, x, {path: int(density * size) for path, size in sizes.items()})
    taken, most = macs_per_sample(model, x), sc.profile(model, x[:1]).effective_macs
    assert float(taken.max()) <= most and float(taken.min()) > 0.5 * most
    assert macs_per_sample(model, x[:1]).tolist() == [taken[0]]  # skipped or masked


def test_what_stands_between_gates_makes_something_of_zeros_or_mixes_channels():
    x = torch.randn(1, 3, 8, 8)
    shifted = nn.Sequential(*two_layers()[:3], nn.BatchNorm2d(4), *two_layers()[3:])
    gated(shifted, x)
    assert Wiring(shifted, x).reads({"0": 2, "4": 3})["4"] == 4
    mixed = nn.Sequential(*two_layers()[:3], nn.Conv2d(4, 4, 1, bias=False), *two_layers()[3:])
    gated(mixed, x)
    assert Wiring(mixed, x).reads({"0": 2, "4": 3})["4"] == 4
    pooled = nn.Sequential(
        *two_layers()[:3], nn.MaxPool2d(2), nn.PixelUnshuffle(2), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)
    )
    gated(pooled, x)
    assert Wiring(pooled, x).reads({"0": 2, "5": 3})["5"] == 8  # each of two channels has become four
    scoped = two_layers()
    gated(scoped, x, include=("3",))
    assert Wiring(scoped, x).reads({"3": 3})["3"] == 4
