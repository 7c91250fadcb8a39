from __future__ import annotations

from itertools import pairwise

import pytest

from secateur.core.schedule import Cubic, Iterative, Linear, OneShot
from secateur.errors import InvalidRecipe


def test_one_shot_is_one_level_at_the_start():
    assert OneShot().levels(0.3) == ((0.0, 0.3),)


def test_iterative_removes_the_same_fraction_each_time_and_ends_exactly():
    levels = Iterative(steps=4).levels(0.0625)
    assert [level.keep for level in levels] == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert levels[-1].keep == 0.0625 and [level.at for level in levels] == [0, 0.25, 0.5, 0.75]


def test_iterative_cuts_lie_within_their_span():
    assert [level.at for level in Iterative(steps=4, span=0.5).levels(0.1)] == [0, 0.125, 0.25, 0.375]
    assert [level.at for level in Iterative(steps=4, span=0).levels(0.1)] == [0, 0, 0, 0]


def test_cubic_follows_the_formula():
    levels = Cubic(steps=4, start=0.0, end=0.6).levels(0.2)
    expected = [1 - 0.8 * (1 - (1 - i / 4) ** 3) for i in (1, 2, 3, 4)]
    assert [level.keep for level in levels] == pytest.approx(expected) and levels[-1].keep == 0.2
    assert [level.at for level in levels] == pytest.approx([0, 0.2, 0.4, 0.6])
    midpoint = Cubic(steps=2).levels(0.2)[0].keep
    assert midpoint == pytest.approx(0.2 + 0.8 / 8)  # at half time an eighth of the way is left


def test_linear_removes_the_same_amount_each_time_and_ends_exactly():
    levels = Linear(steps=5, start=0.2, end=0.6).levels(0.5)
    assert [level.keep for level in levels] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5]) and levels[-1].keep == 0.5
    assert [level.at for level in levels] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


@pytest.mark.parametrize("gradual", [Cubic, Linear])
def test_gradual_schedules_must_end_after_they_start(gradual):
    with pytest.raises(InvalidRecipe, match=f"{gradual.name} schedule must end after it starts"):
        gradual(start=0.5, end=0.5)


def test_schedules_are_monotone():
    for schedule in (Iterative(steps=7), Cubic(steps=9), Linear(steps=4)):
        keeps = [1.0, *(level.keep for level in schedule.levels(0.1))]
        assert all(a > b for a, b in pairwise(keeps))


def test_one_pruning_moment_has_no_earlier_scores():
    with pytest.raises(InvalidRecipe, match="momentum"):
        OneShot(momentum=0.5)
    assert Iterative(momentum=0.5) != Iterative() == Iterative(momentum=0)
