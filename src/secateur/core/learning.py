"""Methods that learn in training, inside a loop that is not ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.errors import InvalidRecipe


class Learning:
    """Calls the hooks of a run around the steps of a training loop that is not ours.

    Args:
        run: Its hooks, if it has any, are called.
        optimizers: Between the gradients and the first optimizer's step comes `after_backward`.
        total_steps: Length of the training.
    """

    def __init__(self, run: Run, optimizers: Sequence[Optimizer], total_steps: int) -> None:
        self._run, self._optimizer, self._total_steps = run, optimizers[0], total_steps
        self._hooks = run.around_steps
        self._state: TrainingState | None = None
        self._asked = False
        self._handle: RemovableHandle | None = None

    @property
    def settled(self) -> bool:
        """Whether hooks want the stretch to end now."""
        return self._state is not None and self._state.stop

    def start(self, step: int) -> None:
        """Begin a stretch of training that ends with the next pruning moment, or with the training.

        After a checkpoint was loaded, `step` lies inside the stretch.
        """
        if not self._hooks or step >= self._total_steps:
            return
        done, level = len(self._run.rounds), self._run.next_level
        first = max(1, math.ceil(self._run.levels[done - 1].at * self._total_steps)) if done else 0
        first = min(first, step)  # the last cut may have come earlier than planned
        last = self._total_steps if level is None else math.ceil(level.at * self._total_steps)
        self._state = state = TrainingState(self._run.units.model, self._optimizer, step, last, first)
        for hooks in self._hooks:
            hooks.on_start(state)

        def after_backward(*_: Any) -> None:
            for hooks in self._hooks:
                hooks.after_backward(state)

        self._handle = self._optimizer.register_step_pre_hook(after_backward)

    def loss_term(self) -> Tensor:
        """Return the hooks' term of the loss, a scalar."""
        self._asked = True
        total = torch.zeros((), device=next(self._run.units.model.parameters()).device)
        if self._state is None:
            return total
        terms = [hooks.loss_term(self._state) for hooks in self._hooks]
        return sum((term for term in terms if term is not None), total)

    def step(self, step: int) -> None:
        """Tell the hooks that the optimizer has moved."""
        if self._state is None:
            return
        if not self._asked and any(type(hooks).loss_term is not Hooks.loss_term for hooks in self._hooks):
            raise InvalidRecipe(
                f"{self._run.recipe.criterion.name!r} adds a term to the loss, and it was not asked for in this step. "
                "Write (loss + pruner.loss_term()).backward()."
            )
        self._asked = False
        self._state.step = step
        for hooks in self._hooks:
            hooks.after_step(self._state)

    def end(self) -> None:
        """End the stretch."""
        if self._state is None:
            return
        if self._handle is not None:
            self._handle.remove()
        for hooks in self._hooks:
            hooks.on_end(self._state)
        self._state = None
