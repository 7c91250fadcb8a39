from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.methods.slimming import Slimming
from secateur.parts.granularity.channel import Channel
from secateur.testing.toys import toy, toy_batches

RECIPE = sc.Recipe(criterion=Slimming(penalty=0.02), granularity="channel", schedule={"name": "one-shot", "at": 0.5})


def small():
    torch.manual_seed(0)
    conv = lambda i, o: [nn.Conv2d(i, o, 3, bias=False), nn.BatchNorm2d(o), nn.ReLU()]  # noqa: E731
    model = nn.Sequential(*conv(3, 8), *conv(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 1)
        model[4].weight.uniform_(-1, -0.5)
    return model, torch.randn(2, 3, 8, 8)


def data():
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(6)]


def scales(model):
    return torch.cat([model[1].weight.detach(), model[4].weight.detach()])


def test_without_another_gradient_every_scale_shrinks_by_penalty_times_learning_rate_until_the_cut():
    model, x = small()
    before = scales(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, method=RECIPE, budget=sc.Budget(macs=0.5), optimizers=sgd, total_steps=6, data=data())
    for step in range(1, 7):
        sgd.zero_grad()
        (0 * model(x).sum()).backward()
        sgd.step()
        if step < 4:
            assert torch.allclose(scales(model), before - step * 0.1 * 0.02 * before.sign(), atol=1e-6)
        pruner.step()
        if step == 3:
            cut = scales(model)
            assert pruner.done and len(cut) < len(before)
    assert torch.equal(scales(model), cut)


def test_scores_are_the_mean_sizes_of_the_scales_of_a_unit():
    model, x = toy("resnet20")
    scores = Slimming().score(sc.Context(Channel().units(model, x, Scope())))
    assert torch.equal(scores["blocks.4.conv1"], model.blocks[4].bn1.weight.abs())
    stream = torch.stack([model.bn1.weight.abs(), *(model.blocks[i].bn2.weight.abs() for i in range(3))])
    torch.testing.assert_close(scores["conv1"], stream.mean(0))


def test_training_with_the_penalty_makes_the_scales_smaller():
    def trained(penalty):
        model, x = small()
        recipe = RECIPE.but(criterion=Slimming(penalty=penalty))
        recovery = {"name": "fine-tune", "epochs": 8, "lr": 0.05}
        return sc.prune(model, x, method=recipe, budget=sc.Budget(sparsity=0.5), data=data(), recovery=recovery)

    free, slim = trained(0), trained(0.3)
    assert scales(slim.model).abs().mean() < scales(free.model).abs().mean() - 0.2
    assert slim.rounds[-1].cost == free.rounds[-1].cost == 10


def test_networks_without_batch_normalization_are_refused_with_the_reason_before_any_training():
    budget, recovery = sc.Budget(macs=0.5), {"name": "fine-tune", "epochs": 2}
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="2 of the 2 axes of Sequential have none.*Use another criterion"):
        sc.prune(model, x, method=RECIPE, budget=budget, data=toy_batches("mlp"), recovery=recovery)
    model, x = toy("mobilenet")
    with pytest.raises(NotApplicable, match=r"Exclude these axes \(scope=\{'exclude': \['3.excite.reduce'"):
        sc.prune(model, x, method=RECIPE, budget=budget, data=toy_batches("mobilenet"), recovery=recovery)
    model, x = small()
    with pytest.raises(NotApplicable, match="choose such a granularity"):
        sc.prune(model, x, method=RECIPE, granularity="weight", budget=sc.Budget(sparsity=0.5),
                 data=data(), recovery=recovery)  # fmt: skip


def test_a_network_is_slimmed_where_it_has_scales():
    model, x = toy("mobilenet")
    result = sc.prune(
        model,
        x,
        method=RECIPE,
        scope={"exclude": ["*.excite.*"]},
        budget=sc.Budget(macs=0.6),
        data=toy_batches("mobilenet"),
        recovery={"name": "fine-tune", "epochs": 1, "lr": 0.01},
    )
    assert result.after.macs <= 0.6 * result.before.macs
    assert F.log_softmax(result.model(x), 1).isfinite().all()
