"""Methods that learn in training, inside a loop that is not ours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.errors import InvalidRecipe


class Learning:
    """Calls the hooks of a run's criterion around the steps of a training loop that is not ours.

    Args:
        run: Its hooks, if it has any, are called.
        optimizers: Between the gradients and the first optimizer's step comes `after_backward`.
        total_steps: Length of the training.
    """

    def __init__(self, run: Run, optimizers: Sequence[Optimizer], total_steps: int) -> None:
        self._run, self._optimizer, self._total_steps = run, optimizers[0], total_steps
        self._state: TrainingState | None = None
        self._asked = False
        self._handle: RemovableHandle | None = None

    def start(self, step: int) -> None:
        """Begin a stretch of training that ends with the next pruning moment, or with the training.

        After a checkpoint was loaded, `step` lies inside the stretch.
        """
        if self._run.hooks is None or step >= self._total_steps:
            return
        done, level = len(self._run.rounds), self._run.next_level
        first = max(1, math.ceil(self._run.levels[done - 1].at * self._total_steps)) if done else 0
        last = self._total_steps if level is None else math.ceil(level.at * self._total_steps)
        self._state = state = TrainingState(self._run.units.model, self._optimizer, step, last, first)
        hooks = self._run.hooks
        hooks.on_start(state)
        self._handle = self._optimizer.register_step_pre_hook(lambda *_: hooks.after_backward(state))

    def loss_term(self) -> Tensor:
        """Return the hooks' term of the loss, a scalar."""
        self._asked = True
        term = self._run.hooks.loss_term(self._state) if self._run.hooks and self._state else None
        return torch.zeros((), device=next(self._run.units.model.parameters()).device) if term is None else term

    def step(self, step: int) -> None:
        """Tell the hooks that the optimizer has moved."""
        if self._run.hooks is None or self._state is None:
            return
        if not self._asked and type(self._run.hooks).loss_term is not Hooks.loss_term:
            raise InvalidRecipe(
                f"{self._run.recipe.criterion.name!r} adds a term to the loss, and it was not asked for in this step. "
                "Write (loss + pruner.loss_term()).backward()."
            )
        self._asked = False
        self._state.step = step
        self._run.hooks.after_step(self._state)

    def end(self) -> None:
        """End the stretch."""
        if self._run.hooks is None or self._state is None:
            return
        if self._handle is not None:
            self._handle.remove()
        self._run.hooks.on_end(self._state)
        self._state = None
