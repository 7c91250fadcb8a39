from __future__ import annotations

import pytest

from secateur.core.budget import Budget
from secateur.errors import InvalidRecipe


def test_exactly_one_quantity():
    with pytest.raises(InvalidRecipe, match="exactly one of params, macs"):
        Budget()
    with pytest.raises(InvalidRecipe, match="got params, macs"):
        Budget(params=0.5, macs=0.5)


@pytest.mark.parametrize(
    ("name", "value"), [("macs", 0), ("macs", 1), ("params", 1.5), ("sparsity", -0.1), ("bytes", 0)]
)
def test_out_of_range_is_refused_with_the_place(name, value):
    with pytest.raises(InvalidRecipe, match=f"Budget: {name}: .*got {value}"):
        Budget(**{name: value})


def test_targets_are_in_the_unit_of_the_dense_cost():
    assert Budget(macs=0.25).target(1000) == 250
    assert Budget(sparsity=0.37).target(10) == 6  # kept units, rounded to whole ones
    assert Budget(bytes=123).target(1e9) == 123
    assert Budget(latency_ms=1.5).target(9) == 1.5


def test_kind_value_and_words():
    assert (Budget(params=0.5).kind, Budget(params=0.5).value) == ("params", 0.5)
    assert str(Budget(macs=0.3)) == "0.3 of the MACs"
    assert str(Budget(sparsity=0.9)) == "0.9 of the units removed"
    assert str(Budget(latency_ms=2)) == "2 ms"
