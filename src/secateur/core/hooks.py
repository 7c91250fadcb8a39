"""Named functions around a training step: all that a method may do inside the loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class TrainingState:
    """What hooks see.

    Attributes:
        model: The model in training.
        optimizer: Its optimizer.
        step: Number of finished optimizer steps.
        last_step: Number at which this stretch of training ends.
        first_step: Number at which it began.
        loss: Loss of the present batch, detached.
        lr: Present learning rate.
        stop: Set by hooks that want the stretch to end here.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int
    last_step: int
    first_step: int = 0
    loss: float = float("nan")
    lr: float = float("nan")
    stop: bool = False

    @property
    def progress(self) -> float:
        """The finished share of this stretch, in [0, 1]."""
        return (self.step - self.first_step) / max(1, self.last_step - self.first_step)


class Hooks:
    """Does nothing at every moment; methods override what they need.

    A run's pruning moments divide its training into stretches; `on_start` and `on_end` come with each of them.
    """

    def on_start(self, state: TrainingState) -> None:
        """Called before the first step of a stretch."""

    def loss_term(self, state: TrainingState) -> Tensor | None:
        """Return a term to add to the loss of this batch, or None."""
        return None

    def after_backward(self, state: TrainingState) -> None:
        """Called when the gradients are there, before the optimizer moves."""

    def after_step(self, state: TrainingState) -> None:
        """Called after the optimizer has moved and the masks were applied."""

    def on_end(self, state: TrainingState) -> None:
        """Called after the last step of a stretch."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs of what was learned: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
