from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.context import Context
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, NotApplicable
from secateur.measure.similarity import cka
from secateur.methods.cka import CKA
from secateur.parts.granularity.depth import Depth
from secateur.testing.toys import toy, toy_batches


class Stream(nn.Module):
    """x + A1 x + A2 x ..., then a linear layer."""

    def __init__(self, *branches):
        super().__init__()
        self.stem = nn.Linear(5, 4, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in branches)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            for block, branch in zip(self.blocks, branches, strict=True):
                block.weight.copy_(branch)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def scored(model, data, **settings):
    units = Depth().units(model, data[0], Scope())
    context = Context(units, data)
    return units, context, CKA(**settings).score(context)


def test_branches_that_rotate_scale_or_do_nothing_leave_the_representation_as_it_is():
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    branches = [torch.randn(4, 4), rotation - torch.eye(4), 2 * torch.eye(4), torch.zeros(4, 4)]
    model = Stream(*branches).double()
    data = list(torch.randn(20, 5, dtype=torch.float64).split(8))
    units, context, scores = scored(model, data)
    changes = next(iter(scores.values()))
    assert changes[1:].abs().max() < 1e-5 < 0.01 < changes[0]
    assert context.samples_used == 5 * 20 and units.model.head.training
    x = model.stem(torch.cat(data)).detach()
    full = model.blocks[0](x).detach() + x
    assert float(changes[0]) == pytest.approx(1 - cka(full @ full.T, x @ x.T), abs=1e-5)


def test_gradients_are_taken_where_features_are():
    model, _ = toy("vit")
    data = [x for x, _ in toy_batches("vit", n=1)]
    features, both = (scored(model, data, gradients=g)[2] for g in (False, True))
    assert features.keys() == both.keys() and all((0 <= s).all() and (s <= 1).all() for s in both.values())
    assert not any(torch.equal(features[g], both[g]) for g in features)


def test_the_first_samples_are_compared():
    model, _ = toy("resnet20")
    data = [x for x, _ in toy_batches("resnet20")]
    _, context, few = scored(model, data, samples=16)
    assert context.samples_used == 8 * 16
    assert all(torch.equal(few[g], s) for g, s in scored(model, data[:2])[2].items())


def test_the_branch_that_matters_least_is_dropped(tmp_path):
    model, x = toy("resnet20")
    data = toy_batches("resnet20")
    with torch.no_grad():
        model.blocks[5].bn2.weight.zero_()
        model.blocks[5].bn2.bias.zero_()
    pruned = sc.prune(model, x, method="cka", data=data, budget=sc.Budget(macs=0.95))
    assert [drop.module for drop in pruned.structure_plan.dropped] == [
        f"blocks.5.{n}" for n in ("conv1", "bn1", "conv2", "bn2")
    ]
    torch.testing.assert_close(pruned.model(x), model(x))


def test_what_cannot_be_ranked_is_said():
    model, x = toy("resnet20")
    with pytest.raises(NotApplicable, match="granularity 'depth'"):
        sc.prune(
            model, x, method="cka", granularity="channel", data=toy_batches("resnet20"), budget=sc.Budget(macs=0.9)
        )
    with pytest.raises(DataNeeded):
        sc.prune(model, x, method="cka", budget=sc.Budget(macs=0.9))
