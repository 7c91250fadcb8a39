from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import InvalidRecipe
from secateur.methods.edge_popup import EdgePopup
from secateur.testing.toys import toy, toy_batches

RECOVERY = {"name": "fine-tune", "epochs": 2, "lr": 0.1, "weight_decay": 0.1}


def prune(model, x, network="mlp", sparsity=0.5, criterion=None, **options):
    return sc.prune(
        model, x, method="edge_popup", budget=sc.Budget(sparsity=sparsity), data=toy_batches(network),
        recovery=RECOVERY, criterion=criterion, **options,
    )  # fmt: skip


@pytest.mark.parametrize("network", ["mlp", "resnet20"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_no_weight_is_ever_trained(network, optimizer):
    model, x = toy(network)
    recovery = {**RECOVERY, "optimizer": optimizer, "epochs": 1}
    found = sc.prune(
        model, x, method="edge_popup", criterion={"name": "edge_popup", "init": "given"}, recovery=recovery,
        budget=sc.Budget(sparsity=0.5), data=toy_batches(network), schedule={"name": "one-shot", "at": 0.5},
    )  # fmt: skip
    before = dict(model.named_parameters())
    for name, parameter in found.model.named_parameters():
        mask = found.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, before[name] * mask)
        assert mask.sum() == mask.numel() - mask.numel() // 2 or name not in found.masks


@pytest.mark.parametrize("scaled", [True, False])
def test_signed_weights_have_one_size_per_layer_and_the_fan_in_counts_what_is_in_use(scaled):
    model, x = toy("mlp")
    found = prune(model, x, sparsity=0.75, criterion=EdgePopup(scaled=scaled))
    for name, mask in found.masks.items():
        weight = found.model.get_parameter(name)
        fan_in = mask[0].numel() * (float(mask.float().mean()) if scaled else 1)
        assert torch.allclose(weight[mask].abs(), torch.tensor(math.sqrt(2 / fan_in)))
        assert (weight > 0).any() and (weight < 0).any()


def test_kaiming_weights_have_that_deviation():
    model, x = toy("mlp")
    hooks = pruner_of(model, x, EdgePopup(init="kaiming"))._run.hooks
    for name, weight in hooks._weights.items():
        assert float(weight.std()) == pytest.approx(math.sqrt(2 / (0.5 * weight.shape[1])), rel=0.15), name


def pruner_of(model, x, criterion, steps=8, **options):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    return sc.Pruner(
        model, x, optimizers=sgd, total_steps=steps, method="edge_popup", criterion=criterion,
        schedule={"name": "one-shot", "at": 0.5}, budget=sc.Budget(sparsity=0.5), data=toy_batches("mlp"), **options,
    )  # fmt: skip


def step(pruner, model, batch):
    optimizer = pruner._companions.optimizers[0]
    optimizer.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    pruner.step()
    return float(loss.detach())


def test_a_step_follows_the_straight_through_gradient():
    model, x = toy("mlp")
    rng = torch.get_rng_state()
    pruner = pruner_of(model, x, EdgePopup(lr=0.3, weight_decay=0.01))
    assert torch.equal(rng, torch.get_rng_state())
    hooks, batch = pruner._run.hooks, toy_batches("mlp")[0]
    scores = {name: score.clone() for name, score in hooks.scores.items()}
    in_use = {
        name: weight * kept for (name, weight), kept in zip(hooks._weights.items(), hooks._kept().values(), strict=True)
    }
    leaves = {name: value.clone().requires_grad_() for name, value in in_use.items()}
    F.cross_entropy(torch.func.functional_call(model, leaves, batch[0]), batch[1]).backward()
    step(pruner, model, batch)
    for name, score in scores.items():
        expected = score - 0.3 * (leaves[name].grad * hooks._weights[name] * score.sign() + 0.01 * score)
        torch.testing.assert_close(hooks.scores[name], expected)


def test_the_density_of_each_layer_is_exact_at_every_step_and_the_cut_takes_the_mask_in_use():
    model, x = toy("mlp")
    torch.manual_seed(0)
    pruner, data = pruner_of(model, x, EdgePopup()), toy_batches("mlp")
    hooks, masks = pruner._run.hooks, []
    for i in range(8):
        step(pruner, model, data[i % len(data)])
        masks.append({name: model.get_parameter(name) != 0 for name in hooks.scores})
        assert all(int(m.sum()) == m.numel() - m.numel() // 2 for m in masks[-1].values())
        for name, mask in masks[-1].items():
            assert torch.equal(model.get_parameter(name), hooks._weights[name] * mask)
    assert pruner.done and any(not torch.equal(masks[0][n], m) for n, m in masks[3].items())
    assert all(torch.equal(masks[3][n], m) for n, m in masks[-1].items())


def test_scores_learn_what_weights_would():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(64, 8)
    batch = (x, (x[:, :4] + x[:, 4:]).argmax(1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(
        model, x[:1], optimizers=sgd, total_steps=101, method="edge_popup", budget=sc.Budget(sparsity=0.5),
        data=[batch], schedule={"name": "one-shot", "at": 0.95},
    )  # fmt: skip
    losses = [step(pruner, model, batch) for _ in range(101)]
    assert losses[-1] < 0.4 * losses[0]


def test_it_goes_on_from_a_checkpoint():
    model, x = toy("mlp")
    pruner, data = pruner_of(model, x, EdgePopup()), toy_batches("mlp")
    for i in range(2):
        step(pruner, model, data[i])
    state, weights = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    other, _ = toy("mlp")
    again = pruner_of(other, x, EdgePopup())
    again.load_state_dict(state)
    other.load_state_dict(weights)
    for i in range(2, 8):
        step(pruner, model, data[i % len(data)])
        step(again, other, data[i % len(data)])
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in model.state_dict().items())


def test_it_needs_training_before_the_cut():
    model, x = toy("mlp")
    with pytest.raises(InvalidRecipe, match="works while the network trains"):
        sc.prune(model, x, method="edge_popup", budget=sc.Budget(sparsity=0.5), data=toy_batches("mlp"))
