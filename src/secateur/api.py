"""`prune`, `save` and `load`: the whole of secateur in three calls."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.budgets import cost_of
from secateur.core import engine
from secateur.core.batches import Data, Loss
from secateur.core.budget import Budget
from secateur.core.method import method as find_method
from secateur.core.recipe import Recipe
from secateur.core.slots import Precision
from secateur.deploy import Artifact, safetensors
from secateur.errors import InvalidInputs, InvalidRecipe, NothingPrunable
from secateur.measure.profile import profile
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.granularity.weight import WeightUnits
from secateur.pruned import Pruned
from secateur.structure.inputs import as_inputs
from secateur.structure.plan import Plan
from secateur.structure.structure import Structure
from secateur.structure.trace import trace
from secateur.training.fabric import join_processes, share_data
from secateur.training.loop import OnStep, accuracy
from secateur.training.recover import Recoverer


def prune(  # the one call that ties everything together, so it has many options
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget,
    method: str | Recipe = "magnitude",
    data: Data | None = None,
    loss: Loss | None = None,
    calibration: Data | None = None,
    validation: Data | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    checkpoints: engine.Checkpoints | None = None,
    on_step: OnStep | None = None,
    precision: Precision = "32-true",
    seed: int = 0,
    **slots: Any,
) -> Pruned:
    """Return a pruned copy of `model`, which is never changed.

    Args:
        model: Any module that runs.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        budget: How much may stay.
        method: Name of a method (see `methods`), or a whole recipe.
        data: Training batches ``(inputs, target)`` or mappings, iterable more than once; for scores and for recovery.
        loss: (output, target) -> scalar; default: the model's own for mappings, else cross-entropy.
        calibration: Batches for scores, if not `data`.
        validation: Batches for an accuracy per epoch of the recovery.
        example_kwargs: Further keyword arguments of the example call.
        checkpoints: State dicts of the unpruned model at other moments: ``"init"``, or training steps.
        on_step: Called after each training step, for progress bars.
        precision: Of the recovery: ``32-true`` or ``bf16-mixed``.
        seed: Controls every random choice.
        **slots: Other answers to a recipe's questions: criterion, scope, mask_from, weights_from, granularity,
            allocation, schedule, recovery; each as a name, a mapping with a name and settings, or a value.

    Raises:
        InvalidRecipe: An unknown slot or setting.
        BudgetUnreachable: The budget cannot be met; says what can.
        NothingPrunable: No unit may be removed.
        DataNeeded: The method or the recovery needs data.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = prune(net, torch.zeros(1, 8), granularity="channel", budget=Budget(macs=0.5)).model
        >>> small[0].out_features
        16
    """
    _check_types(model, budget)
    recipe = _recipe(method, slots)
    inputs = as_inputs(example_inputs, example_kwargs)
    before = profile(model, inputs)
    join_processes(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        units = recipe.granularity.units(copy.deepcopy(model), inputs, recipe.scope)
        if not units.shapes:
            raise NothingPrunable(_why_nothing(units))
        recoverer = Recoverer(
            recipe,
            model,
            inputs,
            data,
            loss=loss,
            evaluate=accuracy(validation) if validation is not None else None,
            on_step=on_step,
            precision=precision,
        )
        for_scores = calibration if calibration is not None else data
        rounds = engine.run(
            recipe,
            units,
            budget,
            cost_of(budget.kind),
            recoverer,
            data=None if for_scores is None else share_data(for_scores),
            loss=loss,
            checkpoints=checkpoints,
            seed=seed,
        )
    structured = units if isinstance(units, ChannelUnits) else None
    return Pruned(
        model=units.model.eval(),
        masks=units.masks if isinstance(units, WeightUnits) else {},
        structure_plan=structured.plan if structured else Plan(),
        before=before,
        after=profile(units.model, inputs),
        recipe=recipe,
        budget=budget,
        seed=seed,
        rounds=tuple(rounds),
        history=recoverer.history,
        structure=structured.dense_structure if structured else None,
        proofs=tuple(structured.proofs) if structured else (),
        inputs=inputs,
    )


def save(pruned: Pruned, path: str | os.PathLike[str]) -> Artifact:
    """Write the pruned network as one safetensors file: tensors, plan, recipe. No code is stored."""
    return safetensors.write(path, pruned.model, pruned.structure_plan, pruned.masks, pruned.about())


def load(path: str | os.PathLike[str], build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network of a file, in eval mode.

    Args:
        path: A file that `save` made.
        build: Makes the original, unpruned network; its weights do not matter.

    Raises:
        InvalidFile: The file is missing, damaged, or not one of ours.
        PlanMismatch: `build` makes another network than the one that was pruned.
    """
    return safetensors.read(path, build)


def _check_types(model: Any, budget: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInputs(f"prune() needs a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(budget, Budget):
        raise InvalidRecipe(f"prune() needs a Budget, for example Budget(macs=0.5); got {budget!r}.")


def _recipe(method: str | Recipe, slots: Mapping[str, Any]) -> Recipe:
    unknown = slots.keys() - Recipe.model_fields.keys()
    if unknown:
        known = ", ".join(Recipe.model_fields)
        raise InvalidRecipe(f"prune() got an unknown option {sorted(unknown)[0]!r}. A recipe's slots are: {known}.")
    recipe = method if isinstance(method, Recipe) else find_method(method).recipe
    return recipe.but(**slots)


def _why_nothing(units: Any) -> str:
    structure: Structure | None = getattr(units, "structure", None)
    if structure is None:
        return "No tensor of this model is in scope. Widen scope.include, or allow biases."
    reasons = sorted({axis.reason for axis in structure.axes if axis.reason})
    listed = "; ".join(reasons[:4]) or "it has no parameters"
    return f"No unit of this model may be removed: {listed}. `secateur inspect` lists every axis with its reason."


__all__ = ["Pruned", "load", "prune", "save", "trace"]
