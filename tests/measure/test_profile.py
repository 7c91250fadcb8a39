from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.measure.profile import count_macs
from secateur.testing.toys import NETWORKS, toy


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "vit"])
def test_macs_are_half_of_pytorchs_flops(name):
    model, x = toy(name)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert 2 * sc.profile(model, x).macs == counter.get_total_flops()


def test_attention_is_counted_by_hand():
    """PyTorch's counter does not know the CPU kernel of attention."""
    model, x = toy("vit")
    n, tokens, width = 2, 16, 24
    patches = n * tokens * 3 * 16 * width
    block = n * tokens * (3 * width * width + width * width + 8 * width * width) + 2 * n * tokens * tokens * width
    assert sc.profile(model, x).macs == patches + 2 * block + n * width * 10


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(10, 20), (1, 10), 200),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2), (1, 4, 5, 5), 25 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 25 * 4 * 6 * 4),
        (nn.Conv1d(3, 5, 3), (2, 3, 7), 2 * 5 * 5 * 9),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 8 * 3 * 16),
    ],
)
def test_single_layers_by_hand(module, shape, macs):
    x = torch.randn(shape)
    assert sc.profile(module, x).macs == macs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * macs


def test_zero_weights_count_as_dense_but_not_as_effective_macs():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:3] = 0
    found = sc.profile(model, torch.randn(3, 4))
    assert (found.macs, found.effective_macs) == (3 * 24, 3 * (4 + 8))
    assert (found.params, found.nonzero_params, found.bytes) == (30, 18, 120)


def test_a_weight_used_twice_counts_twice():
    layer = nn.Linear(4, 4, bias=False)
    found = count_macs(nn.Sequential(layer, layer), torch.randn(1, 4))
    assert found.total == 32 and found.by_parameter == {"0.weight": 32}


def test_products_of_activations_belong_to_no_parameter():
    class Gram(nn.Module):
        def forward(self, x):
            return x @ x.T + F.linear(x, torch.ones(3, 4)).sum()

    found = count_macs(Gram(), torch.randn(3, 4))
    assert found.total == 36 + 36 and not found.by_parameter


def test_the_model_is_left_in_its_mode():
    model, x = toy("resnet20")
    model.train()
    before = model.bn1.running_mean.clone()
    sc.profile(model, x)
    assert model.training and torch.equal(model.bn1.running_mean, before)
