"""Named functions around a training step: all that a method may do inside the loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class TrainingState:
    """What hooks see.

    Attributes:
        model: The model in training.
        optimizer: Its optimizer.
        step: Number of finished optimizer steps.
        last_step: Number at which this training ends.
        loss: Loss of the present batch, detached.
        lr: Present learning rate.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int
    last_step: int
    loss: float = float("nan")
    lr: float = float("nan")


class Hooks:
    """Does nothing at every moment; methods override what they need."""

    def on_start(self, state: TrainingState) -> None:
        """Called once, before the first step."""

    def loss_term(self, state: TrainingState) -> Tensor | None:
        """Return a term to add to the loss of this batch, or None."""
        return None

    def after_backward(self, state: TrainingState) -> None:
        """Called when the gradients are there, before the optimizer moves."""

    def after_step(self, state: TrainingState) -> None:
        """Called after the optimizer has moved and the masks were applied."""

    def on_end(self, state: TrainingState) -> None:
        """Called once, after the last step."""
