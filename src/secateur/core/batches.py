"""Batches in the forms that people have, and the loss on one of them.

A batch is a pair ``(inputs, target)``, or a mapping of keyword arguments (as tokenizers give). Inputs are a tensor,
a tuple of positional arguments, or a mapping of keyword arguments. Without a target, a batch is a tensor, or what a
``DataLoader`` makes of a data set of tensors: a list with one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import DataNeeded

WIDEST_VECTOR = 16
"""float32 numbers in the widest vector register of a CPU."""

_UNLABELED = (
    "Scores can look at other batches (calibration=); of the recoveries, distillation with alpha=1 needs no targets."
)

Loss = Callable[[Any, Any], Tensor]
"""(model output, target) -> scalar loss, the mean over the batch."""

Data = Iterable[Any]
"""A collection of batches that can be iterated more than once."""


def cross_entropy(output: Any, target: Tensor | None) -> Tensor:
    """Return the mean cross-entropy of logits; an output with ``.logits`` is accepted. The default loss.

    Raises:
        DataNeeded: There is no target.
    """
    if target is None:
        raise DataNeeded(f"The task's loss needs targets, and these batches have none. {_UNLABELED}")
    return F.cross_entropy(getattr(output, "logits", output), target)


def logits_and_labels(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of an output, and the labels of a target that may be a mapping.

    Raises:
        DataNeeded: The target has no labels.
    """
    labels = target.get("labels") if isinstance(target, Mapping) else target
    if not isinstance(labels, Tensor):
        raise DataNeeded("This needs labels: batches (inputs, target), or mappings with 'labels'.")
    return getattr(output, "logits", output), labels


def own_loss(output: Any, target: Any) -> Tensor:
    """Return the loss that the model itself has computed (``output.loss``).

    Raises:
        DataNeeded: It has computed none.
    """
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataNeeded(f"The model has computed no loss: are there 'labels' in the batches? {_UNLABELED}")
    return loss


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return positional arguments, keyword arguments and target (None if there is none) of a batch.

    A mapping is its own target.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch), batch
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, target = batch
        if isinstance(inputs, Mapping):
            return (), dict(inputs), target
        return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}, target
    if isinstance(batch, tuple | list) and len(batch) == 1 and isinstance(batch[0], Tensor):
        batch = batch[0]
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


def to_model(batch: Any, model: nn.Module) -> Any:
    """Return the batch with all tensors on the device of `model`, and images in a layout that is safe for it."""
    device = next(model.parameters()).device
    any_layout = channels_last_is_safe(model)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(device)
        return value if any_layout or value.dim() != 4 else value.clone(memory_format=torch.contiguous_format)

    return torch.utils._pytree.tree_map(move, batch)


def channels_last_is_safe(model: nn.Module) -> bool:
    """Return whether the gradients of all convolutions of `model` can be computed in the channels-last layout.

    On some CPUs, the kernel for the weights of a strided 1x1 convolution with fewer input channels than a vector
    register holds writes past its workspace in that layout (oneDNN issue 6035) and corrupts the heap. Pruning makes
    such layers, so networks that have them are trained in the ordinary layout.
    """
    return not any(
        isinstance(m, nn.Conv2d)
        and set(m.kernel_size) == {1}
        and set(m.stride) != {1}
        and m.in_channels < WIDEST_VECTOR
        for m in model.modules()
    )
