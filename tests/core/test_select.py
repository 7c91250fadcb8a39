from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.select import fewest, select, top_k
from secateur.core.units import Limits, LinearCost
from secateur.errors import BudgetUnreachable


def scores(**groups):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in groups.items()}


def lists(kept):
    return {name: mask.int().tolist() for name, mask in kept.items()}


def test_top_k_keeps_the_best_over_all_groups():
    assert lists(top_k(scores(a=[1, 5, 3], b=[4, 2]), 3)) == {"a": [0, 1, 1], "b": [1, 0]}


def test_ties_are_broken_by_index_and_the_count_is_exact():
    equal = scores(a=[7, 7, 7, 7], b=[7, 7])
    for k in range(7):
        kept = top_k(equal, k)
        flat = [*lists(kept)["a"], *lists(kept)["b"]]
        assert flat == [1] * k + [0] * (6 - k)


def test_infinite_priorities_are_extremes():
    kept = top_k(scores(a=[-torch.inf, 0, torch.inf]), 1)
    assert lists(kept) == {"a": [0, 0, 1]}


def test_shapes_are_kept():
    kept = top_k({"w": torch.arange(6.0).view(2, 3)}, 2)["w"]
    assert kept.shape == (2, 3) and kept.sum() == 2


def test_select_meets_a_product_cost_from_below_within_one_unit():
    """Two layers: cost = 10 a + a b + 10 b, as two consecutive convolutions have."""

    def cost(counts):
        return 10 * counts["a"] + counts["a"] * counts["b"] + 10 * counts["b"]

    priorities = scores(a=list(range(10)), b=[0.5 + i for i in range(10)])
    kept = select(priorities, cost, 150)
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    assert cost(counts) <= 150
    # The unit that left last would break the budget: removal order is a0 b0 a1 b1 ...
    removed = 20 - sum(counts.values())
    back = {"a": counts["a"] + (removed % 2), "b": counts["b"] + (1 - removed % 2)}
    assert cost(back) > 150


def test_minimum_is_respected_even_for_the_worst_group():
    kept = select(scores(a=[0, 0, 0], b=[5, 6, 7]), LinearCost({"a": 1, "b": 1}), 2, Limits(minimum=1))
    assert lists(kept) == {"a": [1, 0, 0], "b": [0, 0, 1]}


def test_unreachable_budgets_name_what_is_reachable():
    with pytest.raises(BudgetUnreachable, match=r"allows 1, and the smallest network that can be reached costs 2"):
        select(scores(a=[1, 2, 3], b=[1, 2, 3]), LinearCost({"a": 1, "b": 1}), 1, Limits(minimum=1))


def test_units_that_are_gone_do_not_come_back_into_what_is_left_of_the_budget():
    gone = float("-inf")
    kept = select(scores(a=[gone, gone, 1, 2], b=[5, 6, 7, 8]), LinearCost({"a": 1, "b": 10}), 38)
    assert lists(kept) == {"a": [0, 0, 1, 1], "b": [0, 1, 1, 1]}


def test_the_smallest_network_has_the_minimum_of_each_group_rounded_up_or_the_whole_group():
    sizes = {"a": 20, "b": 5, "c": 8}
    assert fewest(sizes, Limits()) == {"a": 0, "b": 0, "c": 0}
    assert fewest(sizes, Limits(minimum=3)) == {"a": 3, "b": 3, "c": 3}
    assert fewest(sizes, Limits(minimum=9, multiple=8)) == {"a": 16, "b": 5, "c": 8}


def test_tolerance_accepts_a_small_overshoot():
    args = (scores(a=[1, 2, 3], b=[1, 2, 3]), LinearCost({"a": 1, "b": 1}), 1.99, Limits(minimum=1))
    assert sum(int(m.sum()) for m in select(*args, tolerance=0.01).values()) == 2


def test_multiples_leave_in_chunks_and_counts_end_even():
    priorities = scores(a=[float(i) for i in range(10)], b=[100.0 + i for i in range(8)])
    cost = LinearCost({"a": 1, "b": 1})
    for target in (17, 16, 12, 8):
        counts = {n: int(m.sum()) for n, m in select(priorities, cost, target, Limits(1, 4)).items()}
        assert sum(counts.values()) <= target and all(c % 4 == 0 for c in counts.values())
    with pytest.raises(BudgetUnreachable):
        select(priorities, cost, 7, Limits(1, 4))


def test_groups_smaller_than_the_multiple_stay_whole():
    kept = select(scores(a=[1, 2, 3], b=list(range(16))), LinearCost({"a": 1, "b": 1}), 11, Limits(1, 8))
    assert lists(kept)["a"] == [1, 1, 1] and kept["b"].sum() == 8


def test_tied_groups_keep_equally_many_each_its_own_best():
    priorities = scores(a=[9, 1, 8], b=[1, 2, 30], c=[5, 5, 5])
    kept = select(priorities, LinearCost({"a": 1, "b": 1, "c": 1}), 7, Limits(1, ties=(("a", "b"),)))
    assert lists(kept)["a"] == [1, 0, 1] and lists(kept)["b"] == [0, 1, 1] and kept["c"].all()


def test_nothing_leaves_when_the_budget_allows_all():
    assert all(m.all() for m in select(scores(a=[1, 2], b=[3]), LinearCost({"a": 1, "b": 1}), 3, Limits(1)).values())


def test_unequal_linear_costs():
    kept = select(scores(a=[1, 2], b=[3, 4]), LinearCost({"a": 10, "b": 1}, fixed=5), 17)
    assert lists(kept) == {"a": [0, 1], "b": [1, 1]}


def test_cheap_units_come_back_after_an_expensive_one_has_left():
    """The cheap units leave first and the budget is still broken; once the expensive one goes, they fit again."""
    kept = select(scores(cheap=[1, 2, 3], dear=[4, 5]), LinearCost({"cheap": 1, "dear": 100}), 102)
    assert lists(kept) == {"cheap": [0, 1, 1], "dear": [0, 1]}


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=7), min_size=1, max_size=4),
    fraction=st.integers(0, 64).map(lambda n: n / 64),
    minimum=st.integers(0, 2),
    weights=st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
def test_select_equals_removing_units_one_by_one_and_giving_back_what_fits(groups, fraction, minimum, weights):
    """Brute force: remove the lowest priority (the last among equals) until the cost is met."""
    priorities = {f"g{i}": torch.tensor(g, dtype=torch.float64) for i, g in enumerate(groups)}
    per_unit = {f"g{i}": float(weights[i]) for i in range(len(groups))}
    cost = LinearCost(per_unit)
    target = fraction * cost({g: len(v) for g, v in priorities.items()})
    counts = {g: len(v) for g, v in priorities.items()}
    flat = [(float(v), g, i) for g, values in priorities.items() for i, v in enumerate(values)]
    alive = {(g, i) for _, g, i in flat}
    for _, g, i in sorted(flat, key=lambda u: (u[0], [-list(priorities).index(u[1]), -u[2]])):
        if cost(counts) <= target:
            break
        if counts[g] > min(minimum, len(priorities[g])):
            counts[g] -= 1
            alive.discard((g, i))
    if cost(counts) > target:
        with pytest.raises(BudgetUnreachable):
            select(priorities, cost, target, Limits(minimum))
        return
    closed = set()  # then give back what fits, latest first; a group whose best unit does not fit is closed
    for _, g, i in sorted(flat, key=lambda u: (u[0], [-list(priorities).index(u[1]), -u[2]]), reverse=True):
        if (g, i) in alive or g in closed:
            continue
        if cost({**counts, g: counts[g] + 1}) > target:
            closed.add(g)
            continue
        counts[g] += 1
        alive.add((g, i))
    kept = select(priorities, cost, target, Limits(minimum))
    assert {(g, i) for g, mask in kept.items() for i in mask.nonzero().flatten().tolist()} == alive


def test_groups_lose_units_at_their_own_rates():
    limits = Limits(1, ties=(("width", "heads"),), steps={"width": 4})
    priorities = scores(width=[8, 7, 6, 5, 4, 3, 2, 1, 9, 9, 9, 9], heads=[5, 9, 1])
    cost = LinearCost({"width": 1, "heads": 1})
    kept = select(priorities, cost, 10, limits)
    assert lists(kept) == {"width": [1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1], "heads": [1, 1, 0]}
    assert lists(select(priorities, cost, 9, limits)) == {"width": [0] * 8 + [1] * 4, "heads": [0, 1, 0]}
    assert fewest({"width": 12, "heads": 3}, limits) == {"width": 4, "heads": 1}
    rounded = dataclasses.replace(limits, multiple=8)
    assert fewest({"width": 12, "heads": 3}, rounded) == {"width": 8, "heads": 2}
