"""Masks that hold through training: weights are stored already zeroed, and one hook zeroes them again after each step.

No layer is wrapped and the forward pass is untouched, so compilation, distributed training, ``state_dict`` and
export see an ordinary model; gradients are dense. Momentum and weight decay cannot revive a pruned weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.errors import PlanMismatch


class Masks:
    """Which weights of a model are kept.

    Args:
        model: The model whose parameters are masked.
        masks: Bool tensors by parameter name, True = keep; parameters that are not named are kept whole.

    Raises:
        PlanMismatch: A mask without a parameter of its shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        for name, mask in masks.items():
            found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
            if found != tuple(mask.shape):
                raise PlanMismatch(f"The mask of {name!r} has shape {tuple(mask.shape)}; the model has {found}.")
        self._parameters = [parameters[name] for name in masks]
        self._masks = [masks[name].to(parameters[name].device, torch.bool) for name in masks]

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned weights; mutates the model."""
        if self._parameters:
            torch._foreach_mul_(self._parameters, self._masks)  # type: ignore[arg-type]

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Apply the masks now and after every step of `optimizer`; returns a handle with ``remove()``."""
        self.apply()

        def after_step(*_: Any) -> None:
            self.apply()

        return optimizer.register_step_post_hook(after_step)

    def density(self) -> float:
        """Return the kept fraction of the masked parameters, in [0, 1]."""
        total = sum(mask.numel() for mask in self._masks)
        return sum(int(mask.sum()) for mask in self._masks) / total if total else 1.0
