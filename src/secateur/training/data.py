"""Batches of data that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Augment = Callable[[Tensor, torch.Generator], Tensor]
"""(inputs of a batch, random generator) -> changed inputs."""


@dataclass(frozen=True)
class TensorBatches:
    """Batches (inputs, targets) of two tensors, in an order that depends on the seed and the epoch alone.

    The same on every machine and for any number of processes: each takes an equal part of every batch.

    Attributes:
        inputs: Tensor of shape (n, ...).
        targets: Tensor of shape (n, ...).
        batch_size: Samples in one batch of all processes together; the last batch may be smaller.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Controls order and augmentation.
        augment: Changes the inputs of each batch.
        epoch: Which order to take.
        rank: Which process this is.
        world: How many there are.
    """

    inputs: Tensor
    targets: Tensor
    batch_size: int
    shuffle: bool = False
    seed: int = 0
    augment: Augment | None = None
    epoch: int = 0
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return -(-self.inputs.shape[0] // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        n = self.inputs.shape[0]
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        for index in order.split(self.batch_size):
            x, y = self.inputs[index], self.targets[index]
            if self.augment is not None:
                x = self.augment(x, generator)
            if self.world > 1:
                even = len(index) // self.world * self.world  # every process must get equally many
                x, y = x[self.rank : even : self.world], y[self.rank : even : self.world]
            yield x, y

    def at_epoch(self, epoch: int) -> TensorBatches:
        """Return the same data in the order of another epoch."""
        return replace(self, epoch=epoch)

    def share(self, rank: int, world: int) -> TensorBatches:
        """Return one process's part of every batch."""
        return replace(self, rank=rank, world=world)
