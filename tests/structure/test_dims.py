from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.structure.dims import (
    Place,
    concat,
    factors,
    freeze,
    is_frozen,
    leaf,
    leaves,
    mask_under,
    order_under,
    product,
    segments,
    size_under,
    split,
    unify,
    unit_index,
)

HERE = Place("here")


def test_a_leaf_viewed_as_heads_times_head_dim_is_refined():
    width, heads, head_dim = leaf(12), leaf(3), leaf(4)
    unify(width, product([heads, head_dim]), HERE)
    assert [f.size for f in factors(width)] == [3, 4]
    assert list(leaves(width)) == [heads.find(), head_dim.find()]
    assert not is_frozen(width)


def test_products_with_different_factors_are_refined_until_they_align():
    left = product([leaf(6), leaf(4)])
    right = product([leaf(2), leaf(12)])
    unify(left, right, HERE)
    assert [f.size for f in factors(left)] == [2, 3, 4] == [f.size for f in factors(right)]
    assert list(leaves(left)) == list(leaves(right))


def test_products_that_do_not_align_are_frozen_with_the_reason():
    left, right = product([leaf(4), leaf(9)]), product([leaf(6), leaf(6)])
    unify(left, right, Place("add", "block"))
    assert is_frozen(left) and is_frozen(right)
    assert all(node.reasons == ["sizes do not align (add in block)"] for node in (*leaves(left), *leaves(right)))


def test_sums_are_cut_at_both_sides_boundaries():
    left, right = concat([leaf(3), leaf(5)]), concat([leaf(6), leaf(2)])
    unify(left, right, HERE)
    assert [s.size for s in segments(left)] == [3, 3, 2] == [s.size for s in segments(right)]


def test_qkv_as_segments_viewed_as_heads_gives_each_segment_its_own_heads():
    q, k, v = leaf(12), leaf(4), leaf(4)
    unify(concat([q, k, v]), product([leaf(5), leaf(4)]), HERE)
    assert [[f.size for f in factors(s)] for s in (q, k, v)] == [[3, 4], [4], [4]]
    assert list(leaves(q))[-1] is list(leaves(k))[-1] is list(leaves(v))[-1]  # one head dim for all


def test_an_axis_cannot_contain_itself():
    a = leaf(4)
    outer = product([a, leaf(1)])
    unify(a, outer, HERE)
    assert not is_frozen(a)  # a x 1 is a
    half = leaf(2)
    unify(concat([half, half]), half, HERE)
    assert is_frozen(half)


def test_frozen_leaves_freeze_what_they_meet_and_what_they_are_split_into():
    a, b = leaf(6, "input"), product([leaf(2), leaf(3)])
    unify(a, b, HERE)
    assert is_frozen(b)
    c = leaf(5)
    unify(c, leaf(5, "output"), HERE)
    assert next(leaves(c)).reasons == ["output"]


def test_freeze_names_a_reason_once():
    a = leaf(3)
    freeze(a, "x")
    freeze(a, "x")
    assert a.reasons == ["x"]


def test_split_gives_consecutive_pieces():
    whole = leaf(10)
    pieces = split(whole, [2, 5, 3], HERE)
    assert [s.find() for s in segments(whole)] == [p.find() for p in pieces]


def test_masks_of_products_and_sums():
    heads, dim, rest = leaf(2), leaf(3), leaf(2)
    whole = concat([product([heads, dim]), rest])
    masks = {heads: torch.tensor([True, False]), dim: torch.tensor([True, False, True])}
    assert mask_under(whole, masks).tolist() == [True, False, True, False, False, False, True, True]
    assert size_under(whole, {heads: 1, dim: 2}) == 4 == int(mask_under(whole, masks).sum())


def test_order_of_a_product_moves_blocks():
    heads, dim = leaf(2), leaf(3)
    order = order_under(product([heads, dim]), {heads: torch.tensor([1, 0]), dim: torch.tensor([2, 0, 1])})
    assert order.tolist() == [5, 3, 4, 2, 0, 1]


def test_unit_index_tells_which_unit_an_index_belongs_to():
    heads, dim, rest = leaf(2), leaf(3), leaf(2)
    whole = concat([product([heads, dim]), rest])
    assert unit_index(whole, heads).tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    assert unit_index(whole, dim).tolist() == [0, 1, 2, 0, 1, 2, -1, -1]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_any_regrouping_of_the_same_factors_unifies_without_freezing(sizes, data):
    atoms = [leaf(n) for n in sizes]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes)), max_size=3)) | {0, len(sizes)})
    groups = [product(atoms[a:b]) for a, b in pairwise(cuts)]
    other = product([leaf(g.size) for g in groups])
    unify(product(atoms), other, HERE)
    assert other.find().size == product(atoms).size
    assert not any(node.reasons for node in leaves(other))
    assert [f.size for f in factors(other)] == [n for n in sizes if n > 1]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_sums_of_equal_length_always_align(left_sizes, right_sizes):
    total = max(sum(left_sizes), sum(right_sizes))
    left = concat([*(leaf(n) for n in left_sizes), leaf(total - sum(left_sizes))])
    right = concat([*(leaf(n) for n in right_sizes), leaf(total - sum(right_sizes))])
    unify(left, right, HERE)
    assert list(leaves(left)) == list(leaves(right))
    boundaries = {0, total}
    for sizes in (left_sizes, right_sizes):
        boundaries |= {sum(sizes[: i + 1]) for i in range(len(sizes))}
    assert len(segments(left)) == len(boundaries) - 1
