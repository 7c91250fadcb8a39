from __future__ import annotations

import pytest
import torch

import secateur as sc
from secateur.core.recipe import Recipe
from secateur.errors import InvalidRecipe
from secateur.parts.allocation.shuffled import Shuffled
from secateur.testing.toys import toy, toy_batches


@pytest.mark.parametrize(
    ("method", "slots"),
    [
        ("magnitude", {}),
        ("magnitude", {"granularity": "channel"}),
        ("snip", {"criterion": {"name": "snip", "force": 3}}),
        ("synflow", {"schedule": {"name": "iterative", "steps": 3, "span": 0}}),
    ],
)
def test_each_layer_keeps_as_many_units_as_before_at_other_places_that_depend_on_the_seed(method, slots):
    model, x = toy("mlp")
    options = {"budget": sc.Budget(sparsity=0.8), "data": toy_batches("mlp"), "method": method, **slots}
    plain = sc.prune(model, x, **options)
    first, again, other = (sc.prune(model, x, allocation="shuffled", seed=s, **options) for s in (0, 0, 1))
    assert first.rounds[-1].counts == plain.rounds[-1].counts and first.rounds[-1].cost == plain.rounds[-1].cost
    if "granularity" in slots:
        kept = [p.structure_plan.axes["1"].kept for p in (plain, first, again, other)]
        assert kept[1] == kept[2] and len({*kept}) == 3
        return
    for name, mask in plain.masks.items():
        assert first.masks[name].sum() == mask.sum() and torch.equal(first.masks[name], again.masks[name])
        assert not torch.equal(first.masks[name], mask) and not torch.equal(first.masks[name], other.masks[name])
    if method != "magnitude":  # the weights that came back are those of the initial network
        for name, mask in first.masks.items():
            assert torch.equal(first.model.get_parameter(name), model.get_parameter(name) * mask)


def test_the_other_allocation_stays_what_it_was():
    model, x = toy("mlp")
    options = {"budget": sc.Budget(sparsity=0.7), "method": "magnitude"}
    uniform = sc.prune(model, x, allocation="uniform", **options)
    shuffled = sc.prune(model, x, allocation={"name": "shuffled", "of": "uniform"}, **options)
    assert shuffled.rounds[-1].counts == uniform.rounds[-1].counts
    recipe = Recipe(criterion="magnitude", allocation=Shuffled(of="erk"))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_weights_that_earlier_cuts_have_zeroed_cannot_come_back():
    model, x = toy("mlp")
    with pytest.raises(InvalidRecipe, match="brings back units"):
        sc.prune(model, x, budget=sc.Budget(sparsity=0.7), allocation="shuffled", schedule="iterative")
