"""Criteria that learn in training: through `prune`, and inside a loop of the user's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import secateur as sc
from secateur.core.hooks import Hooks
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion, Repair
from secateur.errors import InvalidRecipe
from secateur.testing.toys import toy, toy_batches


class Travel(Hooks):
    """Adds up how far each weight has travelled, and pulls all weights to zero."""

    def __init__(self, run):
        self.run, self.calls, self.chosen = run, [], None
        self.total = {name: torch.zeros_like(w) for name, w in run.units.parameters().items()}

    def on_start(self, state):
        self.calls.append(("start", state.step, state.last_step))

    def loss_term(self, state):
        return 1e-3 * sum(p.square().sum() for p in self.run.units.parameters().values())

    def after_backward(self, state):
        for name, parameter in self.run.units.parameters().items():
            self.total[name] += parameter.grad.abs()

    def after_step(self, state):
        self.chosen = self.run.choose({name: total.clone() for name, total in self.total.items()})

    def on_end(self, state):
        self.calls.append(("end", state.step, state.last_step))

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


class Travelled(Criterion):
    name = "travelled (test)"
    learns = True

    def hooks(self, run):
        return Travel(run)

    def score(self, context):
        return {name: total.clone() for name, total in context.learned.total.items()}


RECIPE = Recipe(criterion=Travelled(), schedule={"name": "one-shot", "at": 0.5})


def options(model_and_x):
    model, x = model_and_x
    return model, x, {"method": RECIPE, "budget": sc.Budget(sparsity=0.6), "data": toy_batches("mlp")}


def test_a_criterion_that_learns_is_called_around_every_step_and_scores_what_it_learned():
    model, x, given = options(toy("mlp"))
    hooks = []

    class Kept(Travelled):
        name = "travelled, kept (test)"

        def hooks(self, run):
            hooks.append(Travel(run))
            return hooks[-1]

    steps = 2 * len(given["data"])
    recipe = RECIPE.but(criterion=Kept())
    pruned = sc.prune(model, x, **{**given, "method": recipe}, recovery={"name": "fine-tune", "epochs": 2, "lr": 0.01})
    half = round(steps / 2)
    assert hooks[0].calls == [("start", 0, half), ("end", half, half), ("start", half, steps), ("end", steps, steps)]
    assert sum(int(m.sum()) for m in pruned.masks.values()) == round(
        0.4 * sum(m.numel() for m in pruned.masks.values())
    )


def test_what_the_run_would_choose_is_what_it_cuts():
    model, x, given = options(toy("mlp"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=8, **given)
    chosen = None
    for i in range(8):
        inputs, target = given["data"][i % len(given["data"])]
        sgd.zero_grad()
        (F.cross_entropy(model(inputs), target) + pruner.loss_term()).backward()
        sgd.step()
        hooks = pruner._run.hooks
        if pruner.step() is not None:
            chosen = hooks.chosen
            assert all(torch.equal(chosen[name], mask) for name, mask in pruner._run.units.masks.items())
    assert chosen is not None and pruner.done
    assert hooks.calls == [("start", 0, 4), ("end", 4, 4), ("start", 4, 8), ("end", 8, 8)]


def test_the_term_reaches_the_gradients_and_is_asked_for():
    model, x, given = options(toy("mlp"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=8, **given)
    term = pruner.loss_term()
    expected = 1e-3 * sum(p.square().sum() for n, p in model.named_parameters() if p.dim() > 1)
    torch.testing.assert_close(term, expected)
    term.backward()
    sgd.step()
    pruner.step()
    sgd.step()
    with pytest.raises(InvalidRecipe, match="pruner.loss_term"):
        pruner.step()


def test_what_was_learned_goes_on_from_a_checkpoint():
    model, x, given = options(toy("mlp"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=8, **given)
    for inputs, target in given["data"][:2]:
        (F.cross_entropy(model(inputs), target) + pruner.loss_term()).backward()
        sgd.step()
        pruner.step()
    again, _ = toy("mlp")
    other = sc.Pruner(again, x, optimizers=torch.optim.SGD(again.parameters(), lr=0.1), total_steps=8, **given)
    other.load_state_dict(pruner.state_dict())
    assert other.steps == 2 and other._run.hooks.calls[-1] == ("start", 2, 4)
    assert all(torch.equal(other._run.hooks.total[n], t) for n, t in pruner._run.hooks.total.items())


def test_without_training_before_the_cut_there_is_one_clear_error():
    model, x, given = options(toy("mlp"))
    with pytest.raises(InvalidRecipe, match="works while the network trains, and this recipe trains nothing"):
        sc.prune(model, x, **given)
    with pytest.raises(InvalidRecipe, match="the first cut must come later"):
        sc.prune(model, x, **given, schedule="one-shot", recovery="fine-tune")


class Doubled(Repair):
    """Doubles the kept weights before the cut, and the biases after it."""

    name = "doubled (test)"

    def before_cut(self, context, kept):
        with torch.no_grad():
            for name, weight in context.units.parameters().items():
                weight[kept[name]] *= 2

    def after_cut(self, context):
        with torch.no_grad():
            for module in context.model.modules():
                if getattr(module, "bias", None) is not None:
                    module.bias *= 2


def test_a_repair_changes_what_stays_before_and_after_the_cut():
    model, x = toy("mlp")
    plain = sc.prune(model, x, budget=sc.Budget(sparsity=0.5))
    repaired = sc.prune(model, x, budget=sc.Budget(sparsity=0.5), repair=Doubled())
    assert torch.equal(repaired.model[1].weight, 2 * plain.model[1].weight)
    assert torch.equal(repaired.model[1].bias, 2 * plain.model[1].bias)
    assert plain.recipe.hash == plain.recipe.but(repair="none").hash != repaired.recipe.hash


def test_a_repair_is_undone_when_the_cut_is_refused():
    model, x = toy("mlp")
    recipe = Recipe(criterion="magnitude", granularity="channel", repair=Doubled2())
    from secateur.budgets import cost_of
    from secateur.core.context import Context
    from secateur.core.engine import Run

    units = recipe.granularity.units(model, x, recipe.scope)
    run = Run(recipe, units, sc.Budget(macs=0.5), cost_of("macs"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = run.choose(recipe.criterion.score(Context(units)))
    units.keep = lambda kept: False
    assert not run._keep(Context(units), kept)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Doubled2(Repair):
    name = "doubled whole (test)"

    def before_cut(self, context, kept):
        with torch.no_grad():
            for weight in context.units.parameters().values():
                weight *= 2


def test_a_stretch_that_is_resumed_has_the_progress_that_it_had():
    model, x, given = options(toy("mlp"))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=8, **given)

    def steps(pruner, sgd, n):
        for i in range(n):
            inputs, target = given["data"][i % len(given["data"])]
            (F.cross_entropy(pruner.model(inputs), target) + pruner.loss_term()).backward()
            sgd.step()
            pruner.step()

    steps(pruner, sgd, 6)
    again, _ = toy("mlp")
    other = sc.Pruner(again, x, optimizers=torch.optim.SGD(again.parameters(), lr=0.1), total_steps=8, **given)
    other.load_state_dict(pruner.state_dict())
    states = [p._learning._state for p in (pruner, other)]
    assert [(s.first_step, s.step, s.last_step, s.progress) for s in states] == [(4, 6, 8, 0.5)] * 2
