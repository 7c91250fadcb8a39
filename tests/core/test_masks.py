from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.errors import PlanMismatch


def test_pruned_weights_stay_zero_under_momentum_and_decay_and_the_others_train_as_always():
    torch.manual_seed(0)
    model, free = nn.Linear(6, 4), nn.Linear(6, 4)
    mask = torch.rand(4, 6) < 0.5
    with torch.no_grad():
        model.weight.mul_(mask)
        free.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1) for m in (model, free)]
    handle = Masks(model, {"weight": mask}).attach(optimizers[0])
    x = torch.randn(8, 6)
    for _ in range(4):
        for m, optimizer in zip((model, free), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).pow(2).mean().backward()
            optimizer.step()
        with torch.no_grad():
            free.weight.mul_(mask)
    assert not model.weight[~mask].any() and torch.equal(model.weight, free.weight)
    assert model.weight.grad[~mask].abs().sum() > 0  # gradients are dense
    handle.remove()
    optimizers[0].step()
    assert model.weight[~mask].any()


def test_attach_applies_at_once_and_density_counts():
    model = nn.Linear(2, 2)
    masks = Masks(model, {"weight": torch.tensor([[True, False], [True, True]])})
    masks.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.weight[0, 1] == 0 and masks.density() == 0.75
    assert Masks(model, {}).density() == 1.0


@pytest.mark.parametrize("masks", [{"weight": torch.ones(2, 3).bool()}, {"wait": torch.ones(2, 2).bool()}])
def test_masks_that_do_not_fit_are_refused(masks):
    with pytest.raises(PlanMismatch, match="mask of"):
        Masks(nn.Linear(2, 2), masks)


def test_half_precision_weights():
    model = nn.Linear(4, 4).to(torch.bfloat16)
    Masks(model, {"weight": torch.eye(4).bool()}).apply()
    assert model.weight.dtype == torch.bfloat16 and int(model.weight.count_nonzero()) == 4
