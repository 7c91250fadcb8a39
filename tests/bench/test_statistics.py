from __future__ import annotations

import pytest
from scipy import stats

from secateur.bench.statistics import Interval, bootstrap, hypervolume, interval, paired, pareto_front, ranks


def test_intervals_are_students():
    found = interval([98.0, 99.0, 99.5])
    low, high = stats.t.interval(0.95, 2, loc=found.mean, scale=stats.sem([98.0, 99.0, 99.5]))
    assert found.mean == pytest.approx(98.8333, abs=1e-4) and found.n == 3
    assert (found.low, found.high) == pytest.approx((low, high))
    assert interval([5.0]).half_width == 0
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_the_bootstrap_is_exact_for_few_values():
    # Of the 27 resamples of (0, 0, 3) one has sum 9, six have 6, twelve have 3, eight have 0.
    assert bootstrap([0.0, 0.0, 3.0], 0.95) == (0.0, 3.0)  # 2.5 % of 27 is less than one resample
    assert bootstrap([0.0, 0.0, 3.0], 0.90) == (0.0, 2.0)  # 5 % is one: the largest mean, 3, is left out
    assert bootstrap([0.0, 0.0, 3.0], 0.40) == (1.0, 1.0)  # 30 % is eight: all the 0, and 3, six times 2 and one 1
    assert bootstrap([7.0]) == (7.0, 7.0)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_the_bootstrap_of_many_values_is_near_the_normal_interval_and_repeatable():
    values = [float(i % 10) for i in range(200)]
    low, high = bootstrap(values)
    half = 1.96 * stats.sem(values)
    assert bootstrap(values) == (low, high)
    assert low == pytest.approx(4.5 - half, abs=0.03) and high == pytest.approx(4.5 + half, abs=0.03)


def test_pairs_share_their_seed():
    found = paired({0: 0.9, 1: 0.8, 2: 0.7, 5: 0.1}, {0: 0.8, 1: 0.7, 2: 0.6, 6: 0.9})
    assert found.difference.mean == pytest.approx(0.1) and found.difference.n == 3
    assert found.difference.half_width == pytest.approx(0, abs=1e-12) and found.verdict == "better"
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert paired({0: 0.1, 1: 0.3}, {0: 0.2, 1: 0.5}).verdict == "undecided"  # -0.1 and -0.2: t(1) is 12.7
    assert paired({0: 0.1, 1: 0.1, 2: 0.1}, {0: 0.2, 1: 0.2, 2: 0.21}).verdict == "worse"
    assert paired({0: 0.9}, {0: 0.1}).verdict == "undecided" and paired({0: 1.0}, {1: 1.0}) is None


def test_the_front_has_what_nothing_beats():
    points = [(3, 5), (1, 1), (2, 4), (2, 3), (4, 5), (5, 7)]
    assert pareto_front(points) == [1, 2, 0, 5]
    assert pareto_front([(1, 1), (1, 1), (1, 0)]) == [0, 1] and pareto_front([]) == []


def test_the_hypervolume_is_the_area_of_a_staircase():
    # From cost 1 to 2 height 1, from 2 to 3 height 4, from 3 to 5 height 5; (4, 5) and (2, 3) are beaten.
    assert hypervolume([(3, 5), (1, 1), (2, 4), (2, 3), (4, 5)], (5, 0)) == 1 + 4 + 10
    assert hypervolume([(3, 5)], (5, 4)) == 2 and hypervolume([(6, 9), (1, -1)], (5, 0)) == 0
    assert hypervolume([], (1, 0)) == 0


def test_ranks_tie_where_intervals_overlap():
    found = ranks({"a": Interval(9, 1, 3), "b": Interval(8, 1, 3), "c": Interval(5, 1, 3), "d": Interval(6.5, 1, 3)})
    assert found == {"a": 1, "b": 1, "d": 2, "c": 3}  # d lies below a alone, c below a and b
    assert ranks({"a": Interval(9, 0, 1), "b": Interval(1, 0, 1)}) == {"a": 1, "b": 1}
