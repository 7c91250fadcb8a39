"""The work of an analysis grows with the number of operations: counted in calls, not in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.slots import Scope
from secateur.parts.granularity.channel import Channel
from secateur.structure.cost import ProductCost
from secateur.structure.prove import half_of_each, prove_cut


class Attention(nn.Module):
    """Pre-norm attention with a table that all layers share, and a gated MLP."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.heads, self.table = 2, table
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        y = F.scaled_dot_product_attention(q * self.table, k * self.table, v, scale=1.0)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Residual(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm_a, self.norm_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))))


def transformer(depth: int) -> tuple[nn.Module, Tensor]:
    table = torch.randn(3, 4)
    return nn.Sequential(*(Attention(table) for _ in range(depth)), nn.Linear(8, 3)).eval(), torch.randn(2, 3, 8)


def resnet(depth: int) -> tuple[nn.Module, Tensor]:
    blocks = [Residual(4) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Conv2d(4, 3, 1)).eval(), torch.randn(1, 3, 6, 6)


def calls(work: Callable[[], Any]) -> int:
    """Return how many functions a piece of work calls, those of C included."""
    count = 0

    def listen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(listen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def stages(build: Callable[[int], tuple[nn.Module, Tensor]], depth: int) -> dict[str, int]:
    """Return the work of each stage at a depth."""
    model, x = build(depth)
    structure = sc.trace(model, x)  # once before, so that caches are filled
    kept = half_of_each(structure, [axis.name for axis in structure.prunable], 0)
    found = {
        "trace": calls(lambda: sc.trace(model, x)),
        "verify": calls(lambda: structure.verify(model)),
        "prove": calls(lambda: prove_cut(model, structure, kept)),
        "cut": calls(lambda: structure.cut(kept)),
    }
    assert structure.verify(model).ok and prove_cut(model, structure, kept).ok
    return found


@pytest.mark.parametrize("build", [transformer, resnet])
def test_twice_the_depth_is_twice_the_work(build):
    shallow, deep = stages(build, 8), stages(build, 16)
    assert {stage: deep[stage] / shallow[stage] for stage in deep if deep[stage] > 2.1 * shallow[stage]} == {}


@pytest.mark.parametrize("build", [transformer, resnet])
def test_no_recursion_over_the_depth(build):
    model, x = build(192)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(400)  # 192 layers would not fit, were each one a call deeper
    try:
        structure = sc.trace(model, x)
        structure.cut(half_of_each(structure, [axis.name for axis in structure.prunable], 0))
    finally:
        sys.setrecursionlimit(limit)
    assert len(structure.prunable) >= 192


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_a_cost_asked_again_is_the_cost_asked_anew(kind):
    model, x = transformer(3)
    units = Channel().units(model, x, Scope())
    cost, generator = cost_of(kind)(units), torch.Generator().manual_seed(0)
    for _ in range(20):
        counts = {
            name: int(torch.randint(1, n + 1, (1,), generator=generator))
            for name, n in units.counts().items()
            if float(torch.rand(1, generator=generator)) < 0.7
        }
        assert cost(counts) == cost_of(kind)(units)(counts)
        if kind != "bytes":
            assert cost(counts) == getattr(units.structure, kind)(counts)


def test_a_cost_works_out_only_what_has_changed():
    model, x = transformer(6)
    structure = sc.trace(model, x)
    cost = ProductCost(structure, ((1, dims) for dims in structure.multiply_adds))
    name = next(axis.name for axis in structure.prunable if axis.role == "hidden unit")
    counts = {axis.name: axis.size for axis in structure.prunable}
    whole = cost(counts)
    one = calls(lambda: cost({**counts, name: 5}))
    assert cost(counts) == whole == structure.macs(counts)
    assert one < calls(lambda: structure.macs({**counts, name: 5})) / 5
