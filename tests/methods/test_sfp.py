from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.engine import Run
from secateur.core.hooks import TrainingState
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.methods.sfp import SoftFilterPruning, filter_norms, zero_filters
from secateur.parts.granularity.channel import Channel
from secateur.testing.toys import TwoLayer, toy, toy_batches


def recipe(**settings):
    return sc.method("sfp").recipe.but(criterion=SoftFilterPruning(**settings), granularity="channel")


def train_step(model, sgd, batch):
    sgd.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    sgd.step()


def test_norms_are_those_of_the_filters_alone():
    model = TwoLayer(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), torch.tensor([[2.0, 6.0]]))
    assert filter_norms(Channel().units(model, torch.randn(1, 2), Scope()))["hidden"].tolist() == [5, 1]


def test_norms_of_a_stream_are_those_of_all_its_filters():
    model, x = toy("resnet20")
    norms = filter_norms(Channel().units(model, x, Scope()))
    kernels = [model.conv1.weight, *(model.blocks[i].conv2.weight for i in range(3))]
    torch.testing.assert_close(norms["conv1"], torch.cat([k.flatten(1) for k in kernels], 1).norm(dim=1))
    torch.testing.assert_close(norms["blocks.1.conv1"], model.blocks[1].conv1.weight.flatten(1).norm(dim=1))


def test_filters_that_are_set_to_zero_grow_again_unless_the_activation_stops_them():
    """Behind a zeroed filter batch normalization gives its shift; below zero, ReLU lets no gradient back."""
    model, x = toy("resnet20")
    with torch.no_grad():
        model.blocks[1].bn1.bias.copy_(torch.tensor([1, 1, 1, -1, 1, 1, 1, -1]))
    units = Channel().units(model, x, Scope())
    kept = {group: torch.arange(shape.numel()) % 2 == 0 for group, shape in units.shapes.items()}
    readers = model.blocks[1].conv2.weight.detach()[::2].clone()
    zero_filters(units, kept)
    conv = model.blocks[1].conv1.weight
    assert not conv[1::2].any() and conv[::2].flatten(1).any(1).all()
    assert torch.equal(model.blocks[1].conv2.weight[::2], readers)  # what reads the zeroed filters is as before
    assert all(norms[1::2].eq(0).all() and norms[::2].gt(0).all() for norms in filter_norms(units).values())
    sgd = torch.optim.SGD(model.train().parameters(), lr=0.1)
    train_step(model, sgd, toy_batches("resnet20")[0])
    assert conv[1::2].flatten(1).any(1).tolist() == [True, False, True, False]


def test_filters_are_zeroed_several_times_last_right_before_the_cut_and_those_are_cut():
    model, x = toy("mlp")
    with torch.no_grad():
        model[1].bias.fill_(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, method=recipe(times=3), budget=sc.Budget(sparsity=0.5), optimizers=sgd,
                       total_steps=12, data=toy_batches("mlp"))  # fmt: skip
    zeroed = []
    for i, batch in enumerate(toy_batches("mlp", n=12)):
        train_step(model, sgd, batch)
        before = model[1].weight.detach().clone()
        if pruner.step() is not None:
            assert i == 5 and pruner.done
            sizes = before.norm(dim=1)
            expected = before[(sizes >= sizes.sort().values[16])]  # half of each group, whatever the others have
            assert torch.equal(model[1].weight, expected)
            continue
        zeroed.append(int((model[1].weight == 0).all(1).sum()))
    # of 6 steps before the cut, the 2nd, the 4th and the last one zero; after a step all have grown again
    assert zeroed == [0, 16, 0, 16, 0] + 6 * [0]
    assert pruner.rounds[0].counts == {"1": 16, "3": 12}


def test_zeroed_filters_do_not_outgrow_the_others_behind_batch_normalization():
    model, x = toy("resnet20")
    with torch.no_grad():
        model.blocks[1].bn1.bias.fill_(1)
    units = Channel().units(model, x, Scope())
    run = Run(recipe(times=1), units, sc.Budget(macs=0.5), cost_of("macs"))
    state = TrainingState(model.train(), torch.optim.SGD(model.parameters(), lr=0.1), 4, 4)
    run.hooks.after_step(state)
    conv = model.blocks[1].conv1.weight
    zeroed = conv.flatten(1).eq(0).all(1)
    inputs, target = toy_batches("resnet20")[0]
    F.cross_entropy(model(inputs), target).backward()
    before = conv.grad.clone()
    norms = before.flatten(1).norm(dim=1)
    run.hooks.after_backward(state)
    after = conv.grad.flatten(1).norm(dim=1)
    assert zeroed.any() and norms[zeroed].max() > 10 * norms[~zeroed].max()
    assert after.max() <= norms[~zeroed].max() * 1.0001 and torch.equal(conv.grad[~zeroed], before[~zeroed])
    directions = F.cosine_similarity(conv.grad.flatten(1), before.flatten(1))[norms > 0]
    torch.testing.assert_close(directions, torch.ones_like(directions))


def test_a_network_is_pruned_in_its_training_and_single_weights_are_refused():
    model, x = toy("resnet20")
    given = {"data": toy_batches("resnet20"), "recovery": {"name": "fine-tune", "epochs": 2, "lr": 0.01}}
    result = sc.prune(model, x, method="sfp", granularity="channel", budget=sc.Budget(macs=0.5), **given)
    assert result.after.macs <= 0.5 * result.before.macs
    with pytest.raises(NotApplicable, match="Soft filter pruning works on channels"):
        sc.prune(model, x, method="sfp", granularity="weight", budget=sc.Budget(sparsity=0.5), **given)
