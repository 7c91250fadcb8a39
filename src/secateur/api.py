"""`prune`, `save` and `load`: the whole of secateur in three calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.core import engine
from secateur.core.batches import Data, Loss
from secateur.core.budget import Budget
from secateur.core.randomness import seed_for
from secateur.core.recipe import Recipe
from secateur.core.slots import Precision
from secateur.deploy import Artifact, safetensors
from secateur.job import make_job
from secateur.pruned import Pruned
from secateur.structure.surgery import copied
from secateur.structure.trace import trace
from secateur.training.fabric import join_processes
from secateur.training.loop import OnStep, accuracy
from secateur.training.recover import Recoverer
from secateur.training.teacher import Teachers


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
    teachers: Teachers = (),
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
            Inputs alone are enough for scores that need no labels, and for distillation with ``alpha=1``.
        loss: (output, target) -> scalar; default: the model's own for mappings, else cross-entropy.
        calibration: Batches for scores, if not `data`.
        validation: Batches for an accuracy per epoch of the recovery.
        example_kwargs: Further keyword arguments of the example call.
        checkpoints: State dicts of the unpruned model at other moments: ``"init"``, or training steps. For a recipe
            that takes mask and weights from ``init``, or that cuts only after some training, `model` itself is the
            initial network unless ``"init"`` is given.
        on_step: Called after each training step, for progress bars.
        precision: Of the recovery: ``32-true``, ``bf16-mixed``, or ``auto``: mixed on hardware that has bfloat16.
        teachers: Networks (or state dicts of networks like `model`) that teach beside `model` in a recovery by
            distillation: their probabilities and its own are averaged. They are never changed.
        seed: Controls every random choice.
        **slots: Other answers to a recipe's questions: criterion, scope, mask_from, weights_from, granularity,
            allocation, schedule, repair, recovery; each as a name, a mapping with a name and settings, or a value.

    Raises:
        InvalidRecipe: An unknown slot or setting.
        BudgetUnreachable: The budget cannot be met; says what can.
        NothingPrunable: No unit may be removed.
        DataNeeded: The method or the recovery needs data, or targets.
        InvalidInputs: The model does not run on the inputs, or a teacher's outputs are not like its own.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = prune(net, torch.zeros(1, 8), granularity="channel", budget=Budget(macs=0.5)).model
        >>> small[0].out_features
        16
    """
    job = make_job(model, example_inputs, example_kwargs, budget, method, slots, seed)
    join_processes(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed_for("prune", seed))
        for_scores = calibration if calibration is not None else data
        run = job.start(copied(model), for_scores, loss, checkpoints)
        recoverer = Recoverer(
            run,
            model,
            job.inputs,
            data,
            loss=loss,
            evaluate=accuracy(validation) if validation is not None else None,
            on_step=on_step,
            precision=precision,
            teachers=teachers,
        )
        engine.run(run, recoverer)
    return job.result(run, run.units.model, recoverer.history)


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


__all__ = ["Pruned", "load", "prune", "save", "trace"]
