"""Cached functions: what one layer has computed is no answer for another one."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure.caches import passed_by
from secateur.structure.provenance import TracedInt


@functools.lru_cache(maxsize=16)
def split(shape, parts):
    """Return a shape with heads, as einops works them out."""
    *outer, width = shape
    return [*outer, parts, width // parts]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.project = 4, nn.Linear(8, 16 * 3, bias=False)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = (t.view(split(t.shape, self.heads)).transpose(1, 2) for t in self.project(x).chunk(3, dim=-1))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Counting(nn.Module):
    """Has a cached method."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(6, 8)

    @functools.lru_cache  # noqa: B019
    def halves(self, width):
        return [2, width // 2]

    def forward(self, x):
        y = self.up(x)
        return self.down(y.unflatten(-1, self.halves(y.shape[-1])).sum(-2))


@pytest.mark.parametrize("run_before", [False, True])
def test_layers_that_share_a_cache_are_cut_on_their_own(run_before):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), Attention(), Attention(), nn.Linear(8, 3)).eval(), torch.randn(2, 6, 5)
    split.cache_clear()
    if run_before:
        model(x)  # the cache holds plain sizes now
    structure = sc.trace(model, x)
    assert [axis.size for axis in structure.prunable if axis.role == "head"] == [4, 4]
    assert structure.verify(model).ok
    small = sc.prune(model, x, granularity={"name": "channel", "roles": ("head",)}, budget=sc.Budget(params=0.6)).model
    assert small[1].heads + small[2].heads < 8 and small(x).shape == model(x).shape


def test_cached_methods_are_passed_by():
    model, x = nn.Sequential(nn.Linear(5, 8), Counting(), nn.Linear(8, 3)).eval(), torch.randn(2, 5)
    model(x)
    structure = sc.trace(model, x)
    (half,) = (axis for axis in structure.axes if ("1.down.weight", 1) in axis.members)
    assert half.size == 6 and half.prunable and structure.verify(model).ok


def test_no_traced_integer_stays_in_a_cache_and_everything_is_put_back():
    model, x = Attention().eval(), torch.randn(2, 6, 8)
    split.cache_clear()
    before = split
    sc.trace(model, x)
    assert sys.modules[__name__].split is before and split.cache_info().currsize == 0
    with pytest.raises(RuntimeError, match="stop"), passed_by(model, TracedInt):
        assert sys.modules[__name__].split is not before
        split((2, 6, 16), 4)
        assert split.cache_info().currsize == 1  # plain integers are remembered as ever
        split.cache_clear()
        raise RuntimeError("stop")
    assert sys.modules[__name__].split is before and before.cache_info().currsize == 0
