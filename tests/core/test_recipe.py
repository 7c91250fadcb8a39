from __future__ import annotations

import pytest

import secateur as sc
from secateur.core.recipe import Recipe
from secateur.core.schedule import Iterative
from secateur.core.slots import Criterion, Scope, Slot
from secateur.errors import InvalidRecipe, UnknownName
from secateur.methods.taylor import Taylor
from secateur.parts.granularity.weight import Weight


def test_slots_are_written_as_names_mappings_or_values():
    by_name = Recipe(criterion="taylor", schedule="iterative")
    by_mapping = Recipe(criterion={"name": "taylor", "at": "gate"}, schedule={"name": "iterative", "steps": 5})
    by_value = Recipe(criterion=Taylor(), schedule=Iterative(steps=5))
    assert by_name == by_mapping == by_value and by_name.hash == by_value.hash


def test_defaults_are_real_values():
    recipe = Recipe(criterion="magnitude")
    assert isinstance(recipe.granularity, Weight) and recipe.recovery.epochs == 0


def test_json_round_trip():
    recipe = Recipe(
        criterion={"name": "taylor", "at": "weight"},
        granularity={"name": "channel", "round_to": 8},
        mask_from=500,
        weights_from="init",
        scope=Scope(exclude=("fc*",)),
        recovery={"name": "distill", "alpha": 0.5},
    )
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Recipe(**recipe.model_dump(mode="json")).hash == recipe.hash


def test_the_hash_is_stable_and_sees_every_setting_and_version(monkeypatch):
    recipe = Recipe(criterion="magnitude")
    assert recipe.hash == "899ff33519932ff1"  # the same on every machine
    assert recipe.hash == Recipe(criterion={"name": "magnitude", "p": 2.0}).hash  # defaults are not part of it
    others = [
        recipe.but(criterion={"name": "magnitude", "p": 1}),
        recipe.but(weights_from="fresh"),
        recipe.but(mask_from=1),
    ]
    assert len({recipe.hash, *(other.hash for other in others)}) == 4
    before = recipe.hash
    monkeypatch.setattr(Weight, "version", 2)
    assert recipe.hash != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "taylr"}, "Unknown criterion 'taylr'. Did you mean 'taylor'"),
        ({"criterion": {"name": "taylor", "att": 1}}, "criterion: Taylor: att: Extra inputs"),
        ({"criterion": "taylor", "scheduel": "one-shot"}, "scheduel: Extra inputs"),
        ({"criterion": "taylor", "schedule": {"name": "iterative", "steps": 0}}, "schedule: Iterative: steps: .*got 0"),
        ({"criterion": 3}, "takes a name, or a mapping"),
        ({"criterion": "taylor", "mask_from": "yesterday"}, "mask_from"),
        ({"criterion": "taylor", "weights_from": "fresh-at-last"}, "FreshAtLast: earlier: Field required"),
        ({"criterion": "taylor", "granularity": "atom"}, "Unknown granularity 'atom'.*Known: block, channel, .*weight"),
        ({}, "criterion: Field required"),
    ],
)
def test_mistakes_are_named_with_their_place(settings, message):
    with pytest.raises(InvalidRecipe, match=message):
        Recipe(**settings)


def test_recipes_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        Recipe(criterion="taylor").seed = 3


def test_but_changes_only_what_is_given():
    recipe = Recipe(criterion="taylor", schedule="iterative")
    assert recipe.but(recovery=None) == recipe
    assert recipe.but(recovery="fine-tune").schedule == recipe.schedule


def test_two_answers_of_one_name_are_an_error():
    with pytest.raises(InvalidRecipe, match="Two answers to 'criterion' are named 'taylor'|Two answers"):

        class Impostor(Criterion):
            name = "taylor"

            def score(self, context):
                return {}


def test_parse_refuses_an_answer_to_another_question():
    with pytest.raises(UnknownName):
        Criterion.parse("iterative")
    assert Slot.__subclasses__()


def test_scope_patterns():
    scope = Scope(include=("blocks.*",), exclude=("*.fc*",))
    assert scope.admits("blocks.0.conv") and not scope.admits("blocks.0.fc1") and not scope.admits("stem")


def test_a_misspelled_setting_is_named_before_the_one_that_is_then_missing():
    with pytest.raises(InvalidRecipe, match=r"criterio: Extra inputs.* Did you mean 'criterion'\? Known: allocation, "):
        Recipe(criterio="taylor")


def test_from_scratch_is_what_owes_nothing_to_the_trained_weights():
    assert not any(sc.method(name).recipe.from_scratch for name in ("magnitude", "gradual", "movement"))
    assert all(sc.method(name).recipe.from_scratch for name in ("snip", "rigl", "set", "edge_popup", "lottery"))
    assert sc.method("magnitude").recipe.but(weights_from="fresh").from_scratch


def test_a_method_may_answer_otherwise_for_units_of_several_weights():
    taylor = sc.method("taylor")
    assert taylor.but() == taylor.recipe and taylor.but(granularity="weight").allocation.normalize == "none"
    assert taylor.but(granularity="channel").allocation.normalize == "mean"
    assert taylor.but(granularity="channel", allocation="uniform").allocation.name == "uniform"
    assert taylor.but(granularity="channel", criterion=None).criterion == taylor.recipe.criterion
    plain = sc.method("random")
    assert plain.but(granularity="channel") == plain.recipe.but(granularity="channel")
