"""Batches in the forms that people have, and the loss on one of them.

A batch is a pair ``(inputs, target)``, or a mapping of keyword arguments (as tokenizers give). Inputs are a tensor,
a tuple of positional arguments, or a mapping of keyword arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import DataNeeded

Loss = Callable[[Any, Any], Tensor]
"""(model output, target) -> scalar loss, the mean over the batch."""

Data = Iterable[Any]
"""A collection of batches that can be iterated more than once."""


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits; an output with ``.logits`` is accepted. The default loss."""
    return F.cross_entropy(getattr(output, "logits", output), target)


def own_loss(output: Any, target: Any) -> Tensor:
    """Return the loss that the model itself has computed (``output.loss``)."""
    loss: Tensor = output.loss
    return loss


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return positional arguments, keyword arguments and target of a batch; a mapping is its own target."""
    if isinstance(batch, Mapping):
        return (), dict(batch), batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, target = batch
        if isinstance(inputs, Mapping):
            return (), dict(inputs), target
        return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}, target
    if isinstance(batch, Tensor):
        return (batch,), {}, None
    raise DataNeeded(
        f"A batch must be a pair (inputs, target), a tensor of inputs, or a mapping of keyword arguments; "
        f"got {type(batch).__name__}" + (f" of {len(batch)} items." if isinstance(batch, tuple | list) else ".")
    )


def batch_size(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor."""
    args, kwargs, _ = split_batch(batch)
    return next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()), 1)


def default_loss(batch: Any) -> Loss:
    """Return the loss to use when the user named none: the model's own for mappings, else cross-entropy."""
    return own_loss if isinstance(batch, Mapping) else cross_entropy


def to_device(value: Any, device: torch.device) -> Any:
    """Return the batch with all tensors on `device`."""
    return torch.utils._pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, value)
