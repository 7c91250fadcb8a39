"""Reference networks: trained once by `secateur train`, kept in the package with the record of how."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from secateur.atomic import written_atomically
from secateur.core.recipe import Recipe
from secateur.core.slots import Precision
from secateur.deploy import safetensors
from secateur.environment import environment
from secateur.errors import MissingCheckpoint
from secateur.measure.profile import profile
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks.task import Task
from secateur.training.fabric import chosen_precision
from secateur.training.loop import OnStep, Trainer


def load_reference(task: Task, network: str | None = None) -> nn.Module:
    """Return the trained reference network of a task, in eval mode.

    Raises:
        MissingCheckpoint: The package has none for this network.
    """
    network = network or task.default_network
    path = reference_path(task, network)
    if not path.is_file():
        raise MissingCheckpoint(
            f"There is no reference for {network!r} on {task.name!r}. "
            f"Train one: secateur train {task.name} --network {network} --out {path.name}"
        )
    return safetensors.read(path, lambda: task.build(network))


def reference_path(task: Task, network: str) -> Path:
    """Return where the package keeps a reference."""
    return Path(str(files("secateur.tasks"))) / "references" / f"{task.name}-{network}.safetensors"


def train_reference(
    task: Task,
    network: str | None = None,
    *,
    seed: int = 0,
    settings: FineTune | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a network of a task and return it with the record of its training.

    Args:
        task: What to train on.
        network: Which network; default: the task's.
        seed: Controls weights, order and augmentation.
        settings: Training settings; default: the task's for this network.
        checkpoint: File to resume from if it exists, and to write at the end of each epoch.
        on_step: Called after each step.
    """
    network = network or task.default_network
    settings = settings or task.training_of(network)
    start = perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build(network)
        data = task.train_batches(seed)
        precision = chosen_precision(task.precision, next(model.parameters()).device)
        trainer = Trainer(model, settings, loss=task.loss, precision=precision)
        last = max(1, round(settings.epochs * len(data)))
        history = trainer.run(data, 0, last, evaluate=task.validation_accuracy, on_step=on_step, checkpoint=checkpoint)
    record = {
        "task": task.name,
        "task_version": task.version,
        "data": task.digest,
        "network": network,
        "width": task.networks.get(network),
        "seed": seed,
        "training": settings.model_dump(mode="json"),
        "batch_size": task.batch_size,
        "label_smoothing": task.label_smoothing,
        "precision": precision,
        "profile": profile(model, task.example()).as_dict(),
        "validation_accuracy": history[-1]["validation"],
        "test_accuracy": task.test_accuracy(model),
        "seconds": round(perf_counter() - start, 1),
        "environment": environment(),
        "history": history,
    }
    return model.eval(), record


def early_state(
    task: Task,
    network: str,
    *,
    seed: int,
    settings: FineTune | None = None,
    step: int = 0,
    precision: Precision | None = None,
) -> dict[str, Tensor]:
    """Return the weights that `train_reference` has after so many steps; after none: the initial ones.

    The first steps are made once more: rewinding takes few, and nothing need be kept of a training that is over.
    `precision` is that of the training; default: the task's.
    """
    settings = settings or task.training_of(network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.build(network)
        if step:
            data = task.train_batches(seed)
            trainer = Trainer(model, settings, loss=task.loss, precision=precision or task.precision)
            trainer.run(data, 0, step, lr_span=(0, max(1, round(settings.epochs * len(data)))))
    return model.state_dict()


def early_states(
    task: Task, network: str, recipe: Recipe, facts: Mapping[str, Any]
) -> dict[str | int, dict[str, Tensor]]:
    """Return the weights that a reference had at the moments that a recipe names.

    Args:
        task: What it was trained on.
        network: Which network.
        recipe: Its `mask_from` and `weights_from` say which moments.
        facts: The record of its training: ``seed``, ``training`` and, if it is not the task's, ``precision``.
    """
    settings = FineTune.parse(facts["training"]) if recipe.checkpoints else None
    precision = facts.get("precision")
    return {
        key: early_state(
            task,
            network,
            seed=facts["seed"],
            settings=settings,
            step=0 if key == "init" else int(key),
            precision=precision,
        )
        for key in recipe.checkpoints
    }


def reference_record(task: Task, network: str | None = None) -> dict[str, Any]:
    """Return the record of the training of a reference that the package has."""
    path = reference_path(task, network or task.default_network).with_suffix(".json")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def save_reference(model: nn.Module, record: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a trained network and, beside it, its record as JSON."""
    safetensors.write(path, model, about={key: value for key, value in record.items() if key != "history"})
    with written_atomically(Path(path).with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
