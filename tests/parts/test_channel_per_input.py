"""Where gates may stand, and their places as units."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import NotApplicable, PlanMismatch
from secateur.parts.granularity.channel_per_input import ChannelPerInput, normalized_convolutions
from secateur.structure.inputs import as_inputs
from secateur.testing.toys import toy


class Odd(nn.Module):
    """Convolutions of which only the first may be gated."""

    def __init__(self):
        super().__init__()
        self.plain, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.read_twice, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.in_between, self.bn3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.runs_twice, self.bn4 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.grouped, self.bn5 = nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.tied, self.bn6 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 3)
        self.other.weight = self.tied.weight
        self.no_scale, self.bn7 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.bare = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.relu(self.bn(self.plain(x)))
        y = self.read_twice(x)
        x = y + self.bn2(y)
        x = self.bn3(F.relu_(self.in_between(x)))  # in place: the same tensor, another content
        x = self.runs_twice(self.bn4(self.runs_twice(x)))
        x = self.bn5(self.grouped(x))
        x = self.other(self.bn6(self.tied(x)))
        return self.bare(self.bn7(self.no_scale(x))).mean((2, 3))


def units_of(model, x, **scope):
    return ChannelPerInput().units(model, x, Scope(**scope))


def test_gates_stand_where_nothing_but_the_normalization_reads_a_convolution():
    model, x = Odd().eval(), torch.zeros(2, 3, 12, 12)
    assert normalized_convolutions(model, as_inputs(x)) == {"plain": "bn"}
    before = model(torch.ones_like(x))
    assert list(units_of(model, x).shapes) == ["plain"]
    assert torch.allclose(model(torch.ones_like(x)), before, atol=1e-5)


def test_finding_them_leaves_no_trace():
    model, x = toy("resnet20")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(normalized_convolutions(model, as_inputs(x))) == 21
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_network_without_such_convolutions_is_refused_with_the_reason():
    with pytest.raises(NotApplicable, match="BatchNorm2d"):
        units_of(*toy("mlp"))
    model, x = toy("resnet20")
    units_of(model, x)
    with pytest.raises(NotApplicable, match="already"):
        units_of(model, x)


def test_places_leave_and_stay_listed():
    units = units_of(*toy("resnet20"), include=("blocks.0.*",))
    assert list(units.shapes) == ["blocks.0.conv1", "blocks.0.conv2"]
    total = units.counts()["blocks.0.conv1"]
    kept = {group: torch.rand(shape) < 0.5 for group, shape in units.shapes.items()}
    kept["blocks.0.conv1"][0] = True
    units.keep(kept)
    assert (
        units.gates["blocks.0.conv1"].winners == int(kept["blocks.0.conv1"].sum()) == units.counts()["blocks.0.conv1"]
    )
    assert int(units.removed()["blocks.0.conv1"].sum()) == total - units.counts()["blocks.0.conv1"]
    assert {g: int(mask.sum()) for g, mask in units.kept_in(units.plan).items()} == units.counts()


def test_other_criteria_are_told_that_no_channel_has_a_fixed_score():
    model, x = toy("resnet20")
    with pytest.raises(NotApplicable, match="each input chooses its own"):
        sc.prune(model, x, granularity="channel-per-input", budget=sc.Budget(sparsity=0.5))


def test_weights_of_the_network_without_gates_do_not_fit():
    model, x = toy("resnet20")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units = units_of(model, x)
    with pytest.raises(PlanMismatch, match="gates"):
        units.reset(state)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units.gates["conv1"].saliency.weight.data.fill_(1)
    units.reset(own)
    assert not units.gates["conv1"].saliency.weight.any()
