"""What a task is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.slots import Precision
from secateur.errors import InvalidFile, MissingCheckpoint, UnknownName
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks.networks import build_network
from secateur.training.data import Augment, TensorBatches
from secateur.training.loop import accuracy


class SizedData(Protocol):
    """Batches of which the number is known."""

    def __len__(self) -> int:
        """Return the number of batches in one pass."""

    def __iter__(self) -> Iterator[Any]:
        """Yield batches (inputs, targets)."""


@dataclass(frozen=True)
class Split:
    """Inputs and targets of one part of the data."""

    inputs: Tensor
    targets: Tensor

    def batches(
        self, batch_size: int, shuffle: bool = False, seed: int = 0, augment: Augment | None = None
    ) -> SizedData:
        """Return the split as batches."""
        return TensorBatches(self.inputs, self.targets, batch_size, shuffle, seed, augment)


@dataclass(frozen=True)
class Splits:
    """Train for weights, validation for every choice, test for the last line of a table and nothing else."""

    train: Split
    validation: Split
    test: Split

    def digest(self) -> str:
        """Return a hash of all data and of how they are split: 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(split.inputs.numpy().tobytes())
            digest.update(split.targets.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Task:
    """Data, network, metric and training recipe.

    Attributes:
        name: For example ``digits``.
        version: Raised when any figure would change.
        title: In words.
        load: Returns the splits; inputs are float32 of shape (n, channels, size, size).
        digest: The hash that the splits must have; None for data of the user's own.
        size: Height and width of the inputs.
        networks: Network name -> width.
        default_network: The first choice.
        training: Settings for a reference, by network; ``default`` for those that are not named.
        augment: Changes training inputs.
        label_smoothing: Of the training loss; keeps it from vanishing on data that the network knows by heart.
        batch_size: Of training.
        precision: Of training.
    """

    name: str
    version: int
    title: str
    load: Callable[[], Splits]
    digest: str | None
    size: int
    networks: dict[str, int]
    default_network: str
    training: dict[str, FineTune]
    augment: Augment | None
    batch_size: int
    label_smoothing: float = 0.1
    precision: Precision = "32-true"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the training loss: mean cross-entropy with smoothed labels."""
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing)

    @cached_property
    def splits(self) -> Splits:
        """The data, checked.

        Raises:
            DataUnavailable: They are neither here nor downloadable.
            InvalidFile: They are not the data of this version of the task.
        """
        splits = self.load()
        found = splits.digest()
        if self.digest not in (found, None):
            raise InvalidFile(
                f"The data of task {self.name!r} have hash {found}; version {self.version} has {self.digest}."
            )
        return splits

    def build(self, network: str | None = None) -> nn.Module:
        """Return a new network with random weights (of PyTorch's global random state).

        Raises:
            UnknownName: The task has no such network.
        """
        network = network or self.default_network
        if network not in self.networks:
            raise UnknownName(f"network of task {self.name!r}", network, self.networks)
        return build_network(network, self.networks[network], self.size)

    def pretrained(self, network: str) -> nn.Module:
        """Return a network with weights that its library brings.

        Raises:
            MissingCheckpoint: The task's networks have none.
        """
        raise MissingCheckpoint(f"The networks of task {self.name!r} have no pretrained weights; train {network!r}.")

    def training_of(self, network: str) -> FineTune:
        """Return the training settings of a network's reference."""
        return self.training.get(network, self.training["default"])

    def example(self) -> Tensor:
        """Return one input, as a batch of one."""
        return self.splits.train.inputs[:1]

    def train_batches(self, seed: int = 0) -> SizedData:
        """Return shuffled, augmented training batches."""
        return self.splits.train.batches(self.batch_size, shuffle=True, seed=seed, augment=self.augment)

    def validation_batches(self) -> SizedData:
        """Return the validation split in batches."""
        return self.splits.validation.batches(500)

    def validation_accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the validation split, in [0, 1]."""
        return accuracy(self.validation_batches())(model)

    def test_accuracy(self, model: nn.Module) -> float:
        """Return the accuracy on the test split, in [0, 1]."""
        return accuracy(self.splits.test.batches(500))(model)


def random_shift(pixels: int) -> Augment:
    """Return an augmentation that moves each image by up to `pixels` in each direction; what enters is zero."""

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = x.shape
        padded = F.pad(x, (pixels,) * 4)
        offsets = torch.randint(0, 2 * pixels + 1, (2, n), generator=generator)
        rows = offsets[0][:, None] + torch.arange(height)
        columns = offsets[1][:, None] + torch.arange(width)
        return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    return augment
