from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure.explain import (
    common_name,
    explain_axis,
    explain_tensor,
    expression,
    families,
    shares,
    starred,
    uncuttable,
)
from secateur.testing.toys import toy


@pytest.fixture(scope="module")
def vit():
    return sc.trace(*toy("vit"))


def places(members):
    return {(m.tensor, m.dim): str(m.place) for m in members}


def line_of(place):
    path, _, number = place.line.rpartition(":")
    return Path(path).read_text().splitlines()[int(number) - 1]


def test_the_fused_projection_is_taken_apart_by_the_reshape_in_attention(vit):
    rows, columns = explain_tensor(vit, "blocks.0.attention.qkv.weight")
    assert rows.size == 72 and rows.expression == "3! x 3 x 8" and columns.expression == "24"
    (split,) = rows.splits
    assert (split.op, split.sizes, str(split.place)) == ("*", (3, 3, 8), "reshape in blocks.0.attention")
    assert ".reshape(" in line_of(split.place) and columns.splits == ()
    assert [axis.role for axis in rows.axes] == ["", "head", "head dim"]
    assert [axis.name for axis in columns.axes] == ["patches"]


def test_each_member_names_the_operation_that_tied_it(vit):
    found = places(explain_axis(vit, vit.axis("patches")))
    assert found["patches.weight", 0] == "add"  # the positions are added to the patches
    assert found["blocks.0.attention.proj.weight", 0] == "add in blocks.0"  # the residual stream
    assert found["blocks.1.mlp.2.bias", 0] == "add in blocks.1"
    assert found["norm.weight", 0] == "layer_norm in norm" and found["fc.weight", 1] == "linear in fc"
    assert len(found) == len(vit.axis("patches").members) - 1


def test_ties_are_seen_from_the_member_that_was_asked_about(vit):
    seen = places(explain_axis(vit, vit.axis("patches"), ("blocks.0.attention.proj.weight", 0)))
    assert seen["patches.weight", 0] == "add in blocks.0" and seen["fc.weight", 1] == "linear in fc"
    # Both projections are in the stream before the linear layer of the head sees it.
    seen = places(explain_axis(vit, vit.axis("patches"), ("fc.weight", 1)))
    assert set(seen.values()) == {"linear in fc"}


class Joined(nn.Module):
    """Two branches that only a concatenation and an addition relate."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(5, 6), nn.Linear(5, 10)
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        joined = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(joined + self.c(x))


def test_segments_and_the_addition_that_made_them():
    structure = sc.trace(Joined(), torch.zeros(3, 5))
    (out, _) = explain_tensor(structure, "c.weight")
    assert out.expression == "4 | 6" and [axis.name for axis in out.axes] == ["a", "b"]
    assert [(s.op, s.sizes, s.place.name) for s in out.splits] == [("+", (4, 6), "add")]
    assert "joined + self.c(x)" in line_of(out.splits[0].place)
    assert places(explain_axis(structure, structure.axis("b"))) == {
        ("b.bias", 0): "linear in b",
        ("c.weight", 0): "add",
        ("c.bias", 0): "add",
        ("head.weight", 1): "linear in head",
    }
    assert expression(structure.tensors["head.weight"][0]) == "2!"


def test_a_frozen_axis_says_which_operation_froze_it(vit):
    axis = vit.axis("blocks.1.attention.qkv")
    assert "indexed by a number (unbind in blocks.1.attention)" in axis.reason


def test_shares_are_what_would_go_without_the_axis():
    structure = sc.trace(*toy("mlp"))  # 48 -> 32 -> 24 -> 10
    total_macs, total_params = 48 * 32 + 32 * 24 + 24 * 10, 48 * 32 + 32 + 32 * 24 + 24 + 24 * 10 + 10
    both = [structure.axis("1"), structure.axis("3")]
    first, second, together = shares(structure, [[both[0]], [both[1]], both])
    assert first.macs == pytest.approx((48 * 32 + 32 * 24) / total_macs)
    assert first.params == pytest.approx((48 * 32 + 32 + 32 * 24) / total_params)
    assert second.macs == pytest.approx((32 * 24 + 24 * 10) / total_macs)
    assert together.macs == pytest.approx(1) and together.params == pytest.approx(1 - 10 / total_params)
    assert uncuttable(structure) == {"5.bias": 10}


def test_repeated_blocks_are_one_family(vit):
    named = {family.name: [axis.name for axis in family.axes] for family in families(vit.prunable)}
    assert named == {
        "patches": ["patches"],
        "blocks.*.attention.qkv[heads]": ["blocks.0.attention.qkv[heads]", "blocks.1.attention.qkv[heads]"],
        "blocks.*.attention.qkv[head_dim]": ["blocks.0.attention.qkv[head_dim]", "blocks.1.attention.qkv[head_dim]"],
        "blocks.*.mlp.0": ["blocks.0.mlp.0", "blocks.1.mlp.0"],
    }


def test_only_numbers_of_blocks_become_stars():
    assert starred("layer1.0.conv1:3") == "layer1.*.conv1:3" and starred("0.fc") == "*.fc"
    assert starred("add in blocks.12 (net.py:40)") == "add in blocks.* (net.py:40)"
    assert common_name(["a.0.b.1", "a.0.b.2"]) == "a.0.b.*"
