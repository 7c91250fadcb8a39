"""Training checkpoints: everything that is needed to go on as if nothing had happened, to the bit."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.atomic import written_atomically
from secateur.errors import InvalidFile, PlanMismatch


@dataclass
class Progress:
    """Where a training run is.

    Attributes:
        step: Number of finished optimizer steps.
        losses: Training losses since the last entry of the history.
        history: See `training.loop.History`.
        epoch_rng: PyTorch's random state when the present epoch began.
        rng: PyTorch's random state when the checkpoint was written.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    epoch_rng: Tensor = field(default_factory=torch.get_rng_state)
    rng: Tensor | None = None


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, progress: Progress, run: str
) -> None:
    """Write the state of the training run that `run` describes; the file appears whole or not at all.

    Raises:
        InvalidFile: The disk is full, or cannot be written to.
    """
    state = {
        "run": run,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": {**vars(progress), "rng": torch.get_rng_state()},
    }
    with written_atomically(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise InvalidFile(f"Cannot write the checkpoint {os.fspath(path)!r}: {error}") from error


def load_checkpoint(path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, run: str) -> Progress:
    """Put a checkpoint's state into `model` and `optimizer` and return where it was; no code in the file is run.

    Raises:
        InvalidFile: The file is damaged.
        PlanMismatch: It is of another model or of another run; nothing was loaded.
    """
    name = os.fspath(path)
    try:
        state: dict[str, Any] = torch.load(Path(path), weights_only=True)
        progress = Progress(**state["progress"])
        theirs = {key: tuple(tensor.shape) for key, tensor in state["model"].items()}
        saved_run = state["run"]
    except (OSError, RuntimeError, EOFError, UnpicklingError, KeyError, TypeError, AttributeError) as error:
        raise InvalidFile(
            f"The checkpoint {name!r} is damaged ({type(error).__name__}). Delete it to start anew."
        ) from error
    ours = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if ours != theirs:
        odd = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
        raise PlanMismatch(
            f"The checkpoint {name!r} is of another model: {odd!r} has shape {theirs.get(odd)} there and "
            f"{ours.get(odd)} here. Pass another file, or build the model that it is of."
        )
    if saved_run != run:
        raise PlanMismatch(
            f"The checkpoint {name!r} is of another run: {saved_run}; asked for: {run}. "
            "Use the same settings, or another file."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return progress
