"""The only file that imports Lightning Fabric: devices, precision, several processes."""

from __future__ import annotations

import logging
import os
from typing import Any, Literal, get_args

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from secateur.core.batches import Data
from secateur.core.slots import Precision
from secateur.errors import InvalidRecipe
from secateur.training.data import TensorBatches

__all__ = ["Fabric", "average_buffers", "chosen_precision", "join_processes", "make_fabric", "processes", "share_data"]


def make_fabric(model: nn.Module, precision: Precision = "32-true") -> Fabric:
    """Return a Fabric for the device that `model` is on, with all processes that ``torchrun`` started.

    Args:
        model: The model to train; it stays where it is.
        precision: ``32-true``, ``bf16-mixed`` or ``auto``.

    Raises:
        InvalidRecipe: Another precision.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = next(model.parameters()).device
    fabric = Fabric(
        accelerator="cuda" if device.type == "cuda" else "cpu",
        devices=world if device.type != "cuda" or world > 1 else [device.index or torch.cuda.current_device()],
        strategy="ddp" if world > 1 else "auto",
        precision=chosen_precision(precision, device),
    )
    fabric.launch()
    return fabric


def chosen_precision(precision: Precision, device: torch.device) -> Literal["32-true", "bf16-mixed"]:
    """Return the precision that a training has on a device: ``auto`` is mixed only where hardware has bfloat16.

    Raises:
        InvalidRecipe: An unknown precision.
    """
    if precision not in get_args(Precision):
        raise InvalidRecipe(f"Unknown precision {precision!r}; known: {', '.join(get_args(Precision))}.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and any(
            has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")
        )
    return "bf16-mixed" if native else "32-true"


def join_processes(model: nn.Module) -> None:
    """Connect with the other processes that ``torchrun`` started, if there are any and nobody has done so yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        make_fabric(model)


def processes() -> int:
    """Return how many processes train together."""
    connected = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if connected else 1


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their running statistics; mutates `model`. Parameters agree already."""
    if processes() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            torch.distributed.all_reduce(buffer)
            buffer.div_(processes())


def share_data(data: Data) -> Data:
    """Return this process's share of the data; all of it if there is only one process."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world == 1:
        return data
    if isinstance(data, TensorBatches):
        return data.share(rank, world)
    if isinstance(data, DataLoader):
        shared: Any = Fabric(accelerator="cpu", devices=world, strategy="ddp").setup_dataloaders(data)
        return shared  # type: ignore[no-any-return]
    return data
