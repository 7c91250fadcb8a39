from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure.roles import ROLES, Role
from secateur.testing.toys import GroupedQueries, toy


def roles(model, x):
    return {axis.name: axis.role for axis in sc.trace(model.eval(), x).axes}


class Rotated(nn.Module):
    """Sums that are no branches: a rotary embedding and a handwritten GELU, both after a contraction."""

    def __init__(self):
        super().__init__()
        self.q, self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        q = self.q(x)
        a, b = q.chunk(2, -1)
        q = q * 0.8 + torch.cat([-b, a], -1) * 0.6
        h = self.up(q)
        return self.down(h * torch.tanh(h + 0.04 * h.pow(3)))


def test_every_role_has_a_meaning():
    assert set(ROLES) == set(get_args(Role))


def test_transformer():
    model, x = toy("vit")
    found = roles(model, x)
    assert found["patches"] == "residual stream"
    assert found["blocks.0.attention.qkv[heads]"] == "head"
    assert found["blocks.0.attention.qkv[head_dim]"] == "head dim"
    assert found["blocks.0.mlp.0"] == "hidden unit"
    assert found["positions:1"] == found["patches:2"] == ""  # the inputs say how many there are; a kernel


@pytest.mark.parametrize("name", ["resnet20", "mobilenet"])
def test_sums_make_a_residual_stream_and_inner_widths_are_channels(name):
    model, x = toy(name)
    found = roles(model, x)
    stream, inner = {"resnet20": ("conv1", "blocks.0.conv1"), "mobilenet": ("0", "3.expand.0")}[name]
    assert found[stream] == "residual stream" and found[inner] == "channel"


def test_a_shortcut_with_a_projection_joins_branches_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.short = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 1, 1), nn.Conv2d(4, 8, 1, 2)

        def forward(self, x):
            return self.short(x) + self.b(self.a(x).relu())

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), nn.Conv2d(8, 2, 1))
    found = roles(model, torch.randn(2, 3, 8, 8))
    assert (found["0"], found["1.a"], found["1.b"]) == ("channel", "channel", "residual stream")


def test_branches_may_start_from_one_tensor_and_be_added_one_by_one():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            y = x + self.a(x)
            return y + self.b(x).relu()

    found = roles(nn.Sequential(nn.Linear(3, 6), Parallel(), nn.Linear(6, 2)), torch.randn(2, 3))
    assert found["0"] == "residual stream"


@pytest.mark.parametrize("copied", [True, False])
def test_grouped_queries(copied):
    axes = sc.trace(GroupedQueries(copied).eval(), torch.randn(2, 7, 12)).axes
    by_role = {axis.role: {name for name, _ in axis.members} for axis in axes if axis.role not in ("", "head dim")}
    assert by_role.keys() == {"kv group", "query head"}
    assert {"q.weight", "k.weight", "v.weight", "o.weight"} <= by_role["kv group"]
    assert by_role["query head"] == {"q.weight", "q.bias", "o.weight"}


def test_attention_by_matrix_products():
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.heads = nn.Linear(6, 24), 2

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).flatten(1)

    found = roles(Products(), torch.randn(2, 5, 6))
    assert found["qkv[heads]"] == "head" and "head dim" in found.values()


def test_sums_within_a_branch_are_no_streams():
    found = roles(Rotated(), torch.randn(2, 6))
    assert found["up"] == "hidden unit" and "residual stream" not in found.values()


def test_recurrent_units_and_plain_layers():
    class Recurrent(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.cell, self.head = kind(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    for kind in (nn.LSTM, nn.GRU):
        axes = sc.trace(Recurrent(kind).eval(), torch.randn(2, 5, 4)).axes
        assert {axis.role for axis in axes if axis.size == 6} == {"hidden unit"}
    model, x = toy("mlp")
    assert roles(model, x)["1"] == "hidden unit"
    model, x = toy("squeeze_excite")
    assert roles(model, x)["0"] == roles(model, x)["2.reduce"] == "channel"
