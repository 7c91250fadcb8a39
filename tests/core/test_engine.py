"""The slots of a recipe, run through the engine on small networks."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.budgets import cost_of
from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.recipe import Recipe
from secateur.core.slots import Repair, Scope
from secateur.core.units import draw_fresh
from secateur.errors import (
    BudgetUnreachable,
    InvalidInputs,
    InvalidRecipe,
    InvalidScores,
    MissingCheckpoint,
    NotApplicable,
    NothingPrunable,
)
from secateur.methods.random import Random
from secateur.testing.toys import toy, toy_batches


def prune(model, x, **options):
    options.setdefault("method", "magnitude")
    options.setdefault("budget", sc.Budget(sparsity=0.5))
    return sc.prune(model, x, **options)


def other_state(model, seed=7):
    torch.manual_seed(seed)
    return {n: torch.randn_like(t) if t.is_floating_point() else t for n, t in model.state_dict().items()}


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_mask_from_init_scores_init_and_keeps_the_live_values(granularity):
    model, x = toy("mlp")
    init = copy.deepcopy(model)
    init.load_state_dict(other_state(model))
    found = prune(model, x, granularity=granularity, mask_from="init", checkpoints={"init": init.state_dict()})
    expected = prune(init, x, granularity=granularity)
    if granularity == "weight":
        assert all(torch.equal(found.masks[n], expected.masks[n]) for n in found.masks)
        weight = dict(found.model.named_parameters())["1.weight"]
        assert torch.equal(weight, model[1].weight * found.masks["1.weight"])
    else:
        assert found.structure_plan == expected.structure_plan
        kept = list(found.structure_plan.axes["1"].kept)
        assert torch.equal(found.model[1].weight, model[1].weight[kept])


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_weights_from_a_checkpoint_are_rewound_under_the_same_mask(granularity):
    model, x = toy("mlp")
    early = other_state(model)
    found = prune(model, x, granularity=granularity, weights_from=100, checkpoints={100: early})
    expected = prune(model, x, granularity=granularity)
    assert found.structure_plan == expected.structure_plan
    if granularity == "weight":
        assert torch.equal(found.model[1].weight, early["1.weight"] * expected.masks["1.weight"])
        assert torch.equal(found.model[1].bias, early["1.bias"])
    else:
        kept = list(expected.structure_plan.axes["1"].kept)
        assert torch.equal(found.model[1].weight, early["1.weight"][kept])


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_fresh_weights_share_nothing_with_the_pruned_ones_and_depend_on_the_seed(granularity):
    model, x = toy("mlp")
    same = prune(model, x, granularity=granularity)
    fresh = [prune(model, x, granularity=granularity, weights_from="fresh", seed=s) for s in (1, 1, 2)]
    a, b, c = (f.model[1].weight.detach() for f in fresh)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.shape == same.model[1].weight.shape
    alive = same.masks["1.weight"] if granularity == "weight" else torch.ones_like(a).bool()
    correlation = torch.corrcoef(torch.stack([a[alive], same.model[1].weight.detach()[alive]]))[0, 1]
    assert abs(correlation) < 0.2
    if granularity == "weight":
        assert not a[~alive].any()


def test_fresh_weights_need_constructors_that_can_draw_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(NotApplicable, match=r"reset_parameters.*Odd"):
        draw_fresh(Odd())


def test_missing_checkpoints_are_named():
    model, x = toy("mlp")
    with pytest.raises(MissingCheckpoint, match="'init'; given: 100"):
        prune(model, x, weights_from="init", checkpoints={100: model.state_dict()})
    with pytest.raises(MissingCheckpoint, match="given: none"):
        prune(model, x, mask_from="init")


def test_a_network_that_all_training_comes_after_is_its_own_init():
    model, x = toy("mlp")
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    both = {"mask_from": "init", "weights_from": "init"}
    assert all(torch.equal(m, prune(model, x, **both).masks[n]) for n, m in prune(model, x).masks.items())
    with pytest.raises(MissingCheckpoint, match="given: none"):
        prune(model, x, mask_from="end", weights_from="init")  # rewinding a network to itself
    options = {"method": "magnitude", "budget": sc.Budget(sparsity=0.5), "weights_from": "init"}
    schedule = {"name": "one-shot", "at": 0.5}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=2, schedule=schedule, **options)
    for inputs, target in toy_batches("mlp")[:1]:
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), target).backward()
        sgd.step()
    state = pruner.state_dict()
    for go_on in (False, True):
        if go_on:
            model, _ = toy("mlp")
            with torch.no_grad():
                model[1].weight *= 2  # whatever stands there when a run is taken up again
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=2, schedule=schedule, **options)
            pruner.load_state_dict(state)
        pruner.step()
        kept = pruner._run.units.masks["1.weight"]
        assert torch.equal(model[1].weight, initial["1.weight"] * kept) and not kept.all()


def test_several_cuts_before_any_training_leave_the_whole_recovery_to_the_last():
    model, x = toy("mlp")
    schedule = {"name": "iterative", "steps": 4, "span": 0}
    recovery = {"name": "fine-tune", "epochs": 2, "lr": 0.01}
    data = toy_batches("mlp")
    options = {"budget": sc.Budget(sparsity=0.9), "data": data, "recovery": recovery}
    found = prune(model, x, schedule=schedule, **options)
    expected = prune(model, x, **options)
    assert len(found.rounds) == 4 and found.history[-1]["step"] == 2 * len(data)
    assert all(torch.equal(t, found.model.state_dict()[n]) for n, t in expected.model.state_dict().items())


class ToOne(Repair):
    name = "to one (test)"

    def after_cut(self, context):
        with torch.no_grad():
            for weight in context.units.parameters().values():
                weight[weight != 0] = 1


def test_the_repair_has_the_last_word_about_weights_that_were_set_back():
    model, x = toy("mlp")
    result = prune(model, x, weights_from="init", checkpoints={"init": model.state_dict()}, repair=ToOne())
    assert torch.equal(result.model[1].weight, result.masks["1.weight"].float())


def test_iterative_rounds_reach_exactly_the_budget_and_are_nested():
    model, x = toy("mlp")
    result = prune(model, x, schedule={"name": "iterative", "steps": 4}, budget=sc.Budget(sparsity=0.9))
    total = sum(m.numel() for m in result.masks.values())
    share = round(0.1 * total) / total
    assert [r.keep for r in result.rounds] == pytest.approx([share ** (i / 4) for i in (1, 2, 3, 4)])
    assert sum(int(m.sum()) for m in result.masks.values()) == round(0.1 * total)
    one_shot = prune(model, x, budget=sc.Budget(sparsity=0.9))
    assert all(torch.equal(one_shot.masks[n], result.masks[n]) for n in result.masks)  # scores never change


def test_iterative_channel_cuts_compose_to_one_plan_for_the_original():
    model, x = toy("resnet20")
    result = prune(
        model, x, granularity="channel", schedule={"name": "iterative", "steps": 3}, budget=sc.Budget(macs=0.3)
    )
    assert len(result.proofs) == 3 and all(proof.ok for proof in result.proofs)
    state = result.structure_plan.slice_state(model.state_dict())
    assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in result.model.state_dict().items()}
    assert all(torch.equal(t, result.model.state_dict()[n]) for n, t in state.items())


def test_rounds_are_nested_for_every_budget():
    model, x = toy("resnet20")
    schedule = {"name": "iterative", "steps": 5}
    rounds = []

    class Watched(Random):
        def score(self, context):
            rounds.append({group: gone.clone() for group, gone in context.units.removed().items()})
            return super().score(context)

    recipe = sc.method("random").recipe.but(schedule=schedule, criterion=Watched())
    sc.prune(model, x, method=recipe, budget=sc.Budget(macs=0.3))
    assert len(rounds) == 5 and any(gone.any() for gone in rounds[-1].values())
    for earlier, later in pairwise(rounds):
        assert all(bool((later[group] | ~gone).all()) for group, gone in earlier.items())


def test_unreachable_budgets_name_what_is_reachable_in_their_own_unit():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)), torch.zeros(1, 8)
    for budget, message in (
        (sc.Budget(macs=0.1), r"Ask for Budget\(macs=0.2500\)"),
        (sc.Budget(sparsity=0.9), r"Ask for Budget\(sparsity=0.7500\)"),
        (sc.Budget(bytes=10), r"Ask for Budget\(bytes=68\)"),
    ):
        for schedule in ("one-shot", "iterative"):
            with pytest.raises(BudgetUnreachable, match=message):
                prune(model, x, granularity="channel", budget=budget, schedule=schedule)


def test_wrong_types_are_named():
    with pytest.raises(InvalidRecipe, match=r"needs a Budget, for example Budget\(macs=0.5\); got 0.5"):
        prune(nn.Linear(2, 2), torch.zeros(1, 2), budget=0.5)
    with pytest.raises(InvalidInputs, match=r"needs a torch.nn.Module, got function"):
        sc.prune(lambda x: x, torch.zeros(1, 2), budget=sc.Budget(macs=0.5))


def test_nan_scores_are_refused():
    model, x = toy("mlp")
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(InvalidScores, match="1 of the 1536 scores of '1.weight' are NaN"):
        prune(model, x)


def test_all_equal_scores_still_give_the_exact_count():
    model, x = toy("mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    for granularity in ("weight", "channel"):
        result = prune(model, x, granularity=granularity)
        total = 32 + 24 if granularity == "channel" else 48 * 32 + 32 * 24 + 24 * 10
        assert result.rounds[-1].cost == total // 2
        rounds = prune(model, x, granularity=granularity, schedule={"name": "iterative", "steps": 3}).rounds
        assert rounds[-1].cost == total // 2


def test_a_model_with_one_axis_and_budgets_at_the_extremes():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(1, 6)
    for share, units in ((0.999, 7), (0.5, 4), (0.126, 1)):
        result = prune(model, x, granularity="channel", budget=sc.Budget(macs=share))
        assert result.model[0].out_features == units and result.after.macs == 8 * units
    with pytest.raises(BudgetUnreachable, match=r"Ask for Budget\(macs=0\.1250\)"):
        prune(model, x, granularity="channel", budget=sc.Budget(macs=0.01))


def test_nothing_prunable_says_why():
    with pytest.raises(NothingPrunable, match="input; output"):
        prune(nn.Linear(4, 2), torch.randn(1, 4), granularity="channel")
    with pytest.raises(NothingPrunable, match="in scope"):
        prune(nn.Linear(4, 2), torch.randn(1, 4), scope={"exclude": ["*"]})


def test_scope_excludes_tensors_and_axes():
    model, x = toy("mlp")
    assert "1.weight" not in prune(model, x, scope={"exclude": ["1.*"]}).masks
    assert "1.bias" in prune(model, x, scope={"biases": True}).masks
    result = prune(model, x, granularity="channel", scope={"exclude": ["1"]})
    assert set(result.structure_plan.axes) == {"3"} and result.structure.axis("1").reason == "outside the scope"


def test_a_model_in_training_mode_and_another_dtype():
    model, x = toy("resnet20")
    model.train()
    result = prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5))
    assert model.training and not result.model.training and result.proofs[0].ok
    for dtype in (torch.float64, torch.bfloat16):
        typed = copy.deepcopy(model).to(dtype)
        result = prune(typed, x.to(dtype), method="taylor", granularity="channel", budget=sc.Budget(macs=0.5),
                       data=[(a.to(dtype), b) for a, b in toy_batches("resnet20", 1)])  # fmt: skip
        assert next(result.model.parameters()).dtype == dtype and result.after.macs <= result.before.macs / 2


def test_the_same_call_gives_the_same_network():
    model, x = toy("resnet20")
    options = {
        "method": "taylor", "granularity": "channel", "budget": sc.Budget(macs=0.5), "data": toy_batches("resnet20"),
        "recovery": {"name": "fine-tune", "epochs": 1}, "seed": 5,
    }  # fmt: skip
    a, b = (sc.prune(model, x, **options) for _ in range(2))
    assert a.structure_plan == b.structure_plan
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_unknown_options_are_named():
    model, x = toy("mlp")
    with pytest.raises(sc.SecateurError, match="unknown option 'granularty'"):
        sc.prune(model, x, budget=sc.Budget(macs=0.5), granularty="channel")


@pytest.mark.parametrize(("granularity", "network"), [("weight", "mlp"), ("channel", "mlp"), ("depth", "resnet20")])
def test_scores_are_averaged_over_the_pruning_moments_with_momentum(granularity, network):
    model, x = toy(network)
    schedule = {"name": "iterative", "steps": 3, "momentum": 0.9}
    recipe = Recipe(criterion="random", granularity=granularity, schedule=schedule)
    units = recipe.granularity.units(model, x, recipe.scope)
    run = Run(recipe, units, sc.Budget(params=0.3), cost_of("params"))
    first = Random().score(Context(units, seed=0))
    expected = units.remaining(first, run.choose(first, run.levels[0].keep))
    run.prune()
    assert all(torch.equal(run.scores[g], expected[g]) for g in units.shapes)
    for moment in (1, 2):
        before, new = run.scores, Random().score(Context(units, seed=moment))
        average = {g: 0.9 * before[g] + 0.1 * new[g] for g in new}
        kept = run.choose(average, run.levels[moment].keep)
        expected = units.remaining(average, kept)
        run.prune()
        assert run.scores.keys() == units.shapes.keys()
        assert all(torch.equal(run.scores[g], expected[g]) and v == expected[g].shape for g, v in units.shapes.items())


def test_what_remains_is_known_by_the_names_that_groups_have_afterwards():
    model, x = toy("resnet20")
    units = Recipe(criterion="random", granularity="depth").granularity.units(model, x, Scope())
    values = {group: torch.arange(shape.numel()).float() for group, shape in units.shapes.items()}
    kept = {group: values[group] != 0 for group in units.shapes}  # each group loses the branch that it is named after
    left = units.remaining(values, kept)
    assert units.keep(kept) and not left.keys() & kept.keys()
    assert {group: v.shape for group, v in left.items()} == dict(units.shapes)
    assert all(torch.equal(v, torch.arange(1.0, v.numel() + 1)) for v in left.values())


def test_what_is_gone_takes_no_share_of_what_a_group_may_keep():
    model, x = toy("mlp")
    found = prune(model, x, method="random", allocation="uniform", schedule={"name": "iterative", "steps": 3})
    for mask in found.masks.values():
        assert abs(int(mask.sum()) - mask.numel() / 2) <= 1


@pytest.mark.parametrize(("granularity", "times"), [("weight", 1), ("channel", 4)])
def test_the_cost_is_worked_out_again_only_when_the_units_have_changed(granularity, times):
    model, x = toy("mlp")
    recipe = Recipe(criterion="magnitude", granularity=granularity, schedule={"name": "iterative", "steps": 3})
    calls = []

    def counted(units):
        calls.append(units)
        return cost_of("sparsity")(units)

    run = Run(recipe, recipe.granularity.units(model, x, Scope()), sc.Budget(sparsity=0.5), counted)
    while run.next_level is not None:
        run.prune()
    assert len(calls) == times
