"""The conformance kit: what every method must do. Run it over your own method too.

from secateur.testing.conformance import check_method
check_method("mymethod")
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.api import load, prune, save
from secateur.budgets import cost_of
from secateur.core.budget import Budget
from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks
from secateur.core.masks import Masks
from secateur.core.method import method
from secateur.core.recipe import Recipe
from secateur.core.slots import Schedule, Scope
from secateur.core.units import Scores, Units
from secateur.errors import DataNeeded, NotApplicable
from secateur.parts.allocation.ranking import Global
from secateur.parts.recovery.fine_tune import FineTune
from secateur.testing.toys import NETWORKS, toy, toy_batches
from secateur.training.loop import Trainer

TRAINING = FineTune(epochs=2, lr=0.01)
"""Of methods that learn in training."""

SHORT = 3
"""Pruning moments of methods that have many."""

SETTINGS = {"block": {"name": "block", "shape": (4, 4)}}
"""Of granularities whose units are larger than the toy networks."""

Check = Callable[[str, str], None]
"""Called with (method, granularity); raises AssertionError with a message."""


def check_method(name: str) -> None:
    """Run every check on a method, for each granularity that its card names.

    Raises:
        AssertionError: A check failed.
    """
    for granularity in method(name).card.granularity:
        for check in CHECKS:
            check(name, granularity)


def recipe_round_trips(name: str, granularity: str) -> None:
    """The method's recipe survives JSON, and its hash with it."""
    recipe = method(name).recipe
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again == recipe and again.hash == recipe.hash, f"{name}: the recipe changed in JSON"


def scores_fit(name: str, granularity: str) -> None:
    """One finite score per unit, and not all the same."""
    units, data = _units(granularity)
    scores = _score(name, units, data)
    units.check(scores)
    assert all(bool(values.isfinite().all()) for values in scores.values()), f"{name}: infinite scores"
    assert any(values.unique().numel() > 1 for values in scores.values()), f"{name}: all scores are equal"


def scoring_leaves_no_trace(name: str, granularity: str) -> None:
    """Parameters, buffers, gradients, modes and the random state are as before."""
    units, data = _units(granularity)
    learned = _learned(name, units, data)
    model = units.model.train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, rng = _snapshot(model), torch.get_rng_state()
    recipe_of(name).criterion.score(Context(units, data, learned=learned))
    assert torch.equal(rng, torch.get_rng_state()), f"{name}: scoring used the global random state"
    after = _snapshot(model)
    assert before.keys() == after.keys(), f"{name}: scoring added or removed attributes"
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, f"{name}: scoring changed {key}"


def same_seed_same_scores(name: str, granularity: str) -> None:
    """Scores depend on the seed and on nothing else that changes."""
    first, second = (_score(name, *_units(granularity), seed=3) for _ in range(2))
    assert all(torch.equal(first[group], second[group]) for group in first), f"{name}: scores are not reproducible"


def data_as_declared(name: str, granularity: str) -> None:
    """A method that declares no data uses none; one that declares some says so when there is none."""
    declared = method(name).card.data
    if recipe_of(name).criterion.learns:
        assert declared != "none", f"{name}: learns in training, which needs data"
        return
    units, data = _units(granularity)
    context = Context(units, data)
    recipe_of(name).criterion.score(context)
    if declared == "none":
        assert context.samples_used == 0, f"{name}: the card says no data, {context.samples_used} samples were used"
        return
    assert context.samples_used > 0, f"{name}: the card says {declared}, no data were used"
    try:
        recipe_of(name).criterion.score(Context(units, None))
    except DataNeeded:
        return
    raise AssertionError(f"{name}: needs data, but scored without")


def relabeling_changes_nothing(name: str, granularity: str) -> None:
    """The score of a unit does not depend on its index."""
    if _small(name, granularity) != "mlp" or granularity == "block":
        return  # branches and blocks have places, not indices; and the relabeling below is that of this network
    units, data = _units(granularity, "mlp")
    scores = _score(name, units, data)
    group = next(iter(scores))
    if not torch.equal(scores[group], _score(name, *_units(granularity, "mlp"), seed=1)[group]):
        return  # scores that are drawn at random belong to indices
    order = torch.randperm(units.model[1].out_features, generator=torch.Generator().manual_seed(0))  # type: ignore[index]
    permuted, _ = _units(granularity, "mlp")
    model = permuted.model
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[order])  # type: ignore[index]
        model[1].bias.copy_(model[1].bias[order])  # type: ignore[index]
        model[3].weight.copy_(model[3].weight[:, order])  # type: ignore[index]
    again = _score(name, permuted, data)[group]
    close = torch.allclose(again, scores[group][order], rtol=1e-3, atol=1e-6 * float(scores[group].abs().max()))
    assert close, f"{name}: scores depend on the order of the units"


def counts_are_exact(name: str, granularity: str) -> None:
    """A sparsity budget removes exactly that many units."""
    network = _small(name, granularity)
    model, x = toy(network)
    sparsity = 0.37
    pruned = _prune(name, granularity, model, x, Budget(sparsity=sparsity), schedule="one-shot")
    total = sum(_sizes(granularity, network).values())
    kept = pruned.rounds[-1].cost
    assert kept == round((1 - sparsity) * total), f"{name}: kept {kept} of {total} units at sparsity {sparsity}"


def budget_is_met(name: str, granularity: str) -> None:
    """A MAC budget is met from below, within one unit."""
    for network in sorted({_small(name, granularity), "resnet20"}):
        model, x = toy(network)
        pruned = _prune(name, granularity, model, x, Budget(macs=0.5))
        share = pruned.after.effective_macs / pruned.before.macs
        assert share <= 0.5 + 1e-9, f"{name}: {network} has {share:.4f} of the MACs, asked for 0.5"
        assert share > 0.40, f"{name}: {network} has {share:.4f} of the MACs, much less than the 0.5 asked for"


def masks_are_nested(name: str, granularity: str) -> None:
    """One-shot, on the same scores: what a tight budget keeps, a loose one keeps too."""
    from secateur.core.select import top_k

    units, data = _units(granularity)
    priorities = Global().rank(_score(name, units, data))
    total = sum(values.numel() for values in priorities.values())
    loose, tight = top_k(priorities, total // 2), top_k(priorities, total // 4)
    nested = all(bool((loose[g] | ~tight[g]).all()) for g in tight)
    assert nested, f"{name}: a tighter budget keeps a unit that a looser one removes"


def pruned_weights_stay_pruned(name: str, granularity: str) -> None:
    """Momentum and weight decay do not revive a masked weight."""
    if granularity not in ("weight", "block"):
        return
    model, x = toy("mlp")
    pruned = _prune(name, granularity, model, x, Budget(sparsity=0.5))
    optimizer = torch.optim.SGD(pruned.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    Masks(pruned.model, pruned.masks).attach(optimizer)
    for inputs, target in toy_batches("mlp"):
        optimizer.zero_grad()
        nn.functional.cross_entropy(pruned.model(inputs), target).backward()
        optimizer.step()
    parameters = dict(pruned.model.named_parameters())
    for tensor, mask in pruned.masks.items():
        assert not parameters[tensor][~mask].any(), f"{name}: a pruned weight of {tensor} came back"


def result_survives_a_file(name: str, granularity: str) -> None:
    """Saved and loaded, the network computes the same."""
    model, x = toy("resnet20")
    pruned = _prune(name, granularity, model, x, Budget(macs=0.6))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(pruned, path)
        again = load(path, NETWORKS["resnet20"][0])
    with torch.no_grad():
        difference = float((again(x) - pruned.model(x)).abs().max())
    assert difference <= 1e-5, f"{name}: the loaded network differs by {difference}"


def callers_model_is_untouched(name: str, granularity: str) -> None:
    """Pruning works on a copy."""
    model, x = toy("resnet20")
    before = _snapshot(model)
    _prune(name, granularity, model, x, Budget(macs=0.6))
    after = _snapshot(model)
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, f"{name}: prune() changed {key} of the caller's model"


CHECKS: tuple[Check, ...] = (
    recipe_round_trips,
    scores_fit,
    scoring_leaves_no_trace,
    same_seed_same_scores,
    data_as_declared,
    relabeling_changes_nothing,
    counts_are_exact,
    budget_is_met,
    masks_are_nested,
    pruned_weights_stay_pruned,
    result_survives_a_file,
    callers_model_is_untouched,
)


# ----------------------------------------------------------------------------------------------------- helpers


def refuses(name: str, granularity: str, network: str) -> bool:
    """Return whether a method says that it does not apply to a network: one without batch normalization, perhaps."""
    try:
        _score(name, *_units(granularity, network))
    except NotApplicable:
        return True
    return False


def recipe_of(name: str) -> Recipe:
    """Return a method's recipe; a criterion that trains something inside its scores does so for one epoch only."""
    recipe = method(name).recipe
    quick = {"epochs": 1} if "epochs" in type(recipe.criterion).model_fields else {}
    return recipe.but(criterion=recipe.criterion.model_copy(update=quick))


def _units(granularity: str, network: str = "resnet20") -> tuple[Units, list[tuple[Tensor, Tensor]]]:
    model, x = toy(network)
    recipe = Recipe(criterion="random", granularity=SETTINGS.get(granularity, granularity))
    return recipe.granularity.units(copy.deepcopy(model), x, Scope()), toy_batches(network)


def _small(name: str, granularity: str) -> str:
    """Return a network that has such units, and that the method does not refuse (for want of batch normalization)."""
    return "resnet20" if granularity == "depth" or refuses(name, granularity, "mlp") else "mlp"


def _sizes(granularity: str, network: str) -> dict[str, int]:
    return {group: math.prod(shape) for group, shape in _units(granularity, network)[0].shapes.items()}


def _score(name: str, units: Units, data: Any, seed: int = 0) -> Scores:
    learned = _learned(name, units, data, seed)
    return recipe_of(name).criterion.score(Context(units, data, seed=seed, learned=learned))


def _learned(name: str, units: Units, data: Any, seed: int = 0) -> Hooks | None:
    """Train a little, if that is where the method learns; mutates the model."""
    recipe = recipe_of(name)
    if not recipe.criterion.learns:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hooks = Run(recipe, units, Budget(sparsity=0.5), cost_of("sparsity"), data=data, seed=seed).hooks
        assert hooks is not None, f"{name}: says that it learns, and has no hooks"
        Trainer(units.model, TRAINING, hooks=(hooks,)).run(data, 0, len(data))
    return hooks


def _prune(name: str, granularity: str, model: nn.Module, x: Tensor, budget: Budget, **slots: Any) -> Any:
    network = "mlp" if isinstance(model[0] if isinstance(model, nn.Sequential) else model, nn.Flatten) else "resnet20"
    criterion = recipe_of(name).criterion
    if criterion.learns:
        slots.pop("schedule", None)  # its own comes after some training
    slots.setdefault("schedule", _short(method(name).recipe.schedule))
    return prune(
        model,
        x,
        method=recipe_of(name),
        granularity=SETTINGS.get(granularity, granularity),
        budget=budget,
        data=toy_batches(network),
        checkpoints={"init": model.state_dict()},
        recovery=TRAINING if criterion.learns or criterion.works_in_training else "none",
        **slots,
    )


def _short(schedule: Schedule) -> Schedule:
    """Return a schedule with few pruning moments: a hundred show no more."""
    steps = getattr(schedule, "steps", 1)
    return schedule if steps <= SHORT else schedule.model_copy(update={"steps": SHORT})


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything about a model that somebody could have changed."""
    state: dict[str, Any] = {f"value of {n}": t.detach().clone() for n, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.clone()
        state[f"requires_grad of {name}"] = parameter.requires_grad
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
        state[f"hooks of {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return state
