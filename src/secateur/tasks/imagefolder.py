"""The user's own pictures, with any timm network: what people with ImageNet run.

``SECATEUR_IMAGEFOLDER`` names a folder with ``train/CLASS/*`` and ``val/CLASS/*``, or one that the library ``datasets``
of Hugging Face saved to disk. The pictures of ``val`` (there: ``validation`` or ``test``) are the test split, as the
literature reports it; a tenth of ``train``, at most 50 pictures per class, is held out for every choice. A saved
dataset that has both ``validation`` and ``test`` is taken as it is split; a split without classes, like ImageNet's
``test``, does not count.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from secateur.errors import DataUnavailable, UnknownName
from secateur.optional import optional_import
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks.saved_dataset import SavedSplit, is_saved, open_saved
from secateur.tasks.task import SizedData, Split, Splits, Task
from secateur.tasks.zoo import allow_torchvision
from secateur.training.data import Augment

FOLDER_VARIABLE = "SECATEUR_IMAGEFOLDER"
HELD_OUT = (10, 50)
"""Of each class every tenth picture, at most so many."""


@dataclass(frozen=True)
class FolderSplit(Split):
    """Pictures that are read when they are needed; `inputs` are their indices in the folder."""

    pictures: Any = None

    def batches(
        self, batch_size: int, shuffle: bool = False, seed: int = 0, augment: Augment | None = None
    ) -> SizedData:
        """Return a loader of this split; crops and flips are the folder's own when it is shuffled."""
        dataset: Any = Subset(self.pictures(shuffle), self.inputs.tolist())
        generator = torch.Generator().manual_seed(seed)
        workers = min(4, os.cpu_count() or 1)
        return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator, num_workers=workers)


@dataclass(frozen=True)
class FolderSplits(Splits):
    """The splits of a folder."""

    content: str = ""

    def digest(self) -> str:
        """Return a hash of the names, sizes and classes of all pictures: 16 hexadecimal digits."""
        return self.content


@dataclass(frozen=True)
class FolderTask(Task):
    """Pictures in a folder of the user's."""

    def build(self, network: str | None = None) -> nn.Module:
        """Return a timm network with random weights and as many outputs as the folder has classes."""
        return self._create(network or self.default_network, pretrained=False)

    def pretrained(self, network: str) -> nn.Module:
        """Return a timm network with the weights that timm downloads."""
        return self._create(network, pretrained=True)

    def example(self) -> Tensor:
        """Return one picture's shape, as a batch of one."""
        return torch.zeros(1, 3, self.size, self.size)

    def train_batches(self, seed: int = 0) -> SizedData:
        """Return shuffled training batches with random crops and flips."""
        return self.splits.train.batches(self.batch_size, shuffle=True, seed=seed)

    @cached_property
    def _classes(self) -> int:
        return int(self.splits.train.targets.max()) + 1

    def _create(self, network: str, pretrained: bool) -> nn.Module:
        allow_torchvision()
        timm = optional_import("timm", "timm")
        if not timm.is_model(network):
            raise UnknownName("timm network", network, timm.list_models())
        model: nn.Module = timm.create_model(network, pretrained=pretrained, num_classes=self._classes)
        return model


@dataclass(frozen=True)
class _Part:
    """Pictures that lie together, with their classes."""

    targets: Tensor
    pictures: Callable[[bool], Any]

    def split(self, chosen: Tensor | None = None) -> FolderSplit:
        index = torch.arange(len(self.targets))
        index = index if chosen is None else index[chosen]
        return FolderSplit(index, self.targets[index], self.pictures)


def load() -> Splits:
    """Return the splits of the folder that ``SECATEUR_IMAGEFOLDER`` names.

    Raises:
        DataUnavailable: It is not set, or lacks ``train`` or ``val``.
        InvalidFile: It was saved by ``datasets``, which cannot read it.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    allow_torchvision()
    if named and is_saved(Path(named)):
        return _saved(Path(named))
    if named and all((Path(named) / part).is_dir() for part in ("train", "val")):
        return _folder(Path(named))
    raise DataUnavailable(
        f"The task imagefolder needs pictures: set {FOLDER_VARIABLE} to a folder with train/CLASS and val/CLASS, "
        "or to one that a DatasetDict was saved to (save_to_disk)."
    )


def _folder(root: Path) -> FolderSplits:
    datasets: Any = optional_import("torchvision.datasets", "torchvision")

    def part(name: str) -> _Part:
        def pictures(augmented: bool) -> Any:
            return datasets.ImageFolder(root / name, transform=_transform(augmented))

        return _Part(torch.tensor(pictures(False).targets), pictures)

    return _held_out_splits(part("train"), part("val"), _folder_content(root))


def _saved(root: Path) -> FolderSplits:
    def part(split: SavedSplit) -> _Part:
        return _Part(split.targets, lambda augmented: split.pictures(_transform(augmented)))

    found = open_saved(root)
    parts = {name: split for name in ("train", "validation", "test") if (split := found.get(name)) and split.is_labeled}
    if "train" not in parts or len(parts) < 2:
        raise DataUnavailable(
            f"{root} has the splits {', '.join(found)}; with a class for every picture: {', '.join(parts) or 'none'}; "
            "expected train, and validation or test."
        )
    train, *others = (part(split) for split in parts.values())
    content = _saved_content(parts)
    if len(others) == 1:
        return _held_out_splits(train, others[0], content)
    return FolderSplits(train.split(), others[0].split(), others[1].split(), content)


def _held_out_splits(train: _Part, test: _Part, content: str) -> FolderSplits:
    """Return the splits of data that are split in two."""
    held_out = _held_out(train.targets)
    return FolderSplits(train.split(~held_out), train.split(held_out), test.split(), content)


def _held_out(targets: Tensor) -> Tensor:
    """Return which training pictures are for validation."""
    every, most = HELD_OUT
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for label in targets.unique():
        chosen[(targets == label).nonzero().flatten()[::every][:most]] = True
    return chosen


def _transform(augmented: bool) -> Any:
    """Return the usual ImageNet pipeline: random crops and flips, or the center."""
    transforms: Any = optional_import("torchvision.transforms", "torchvision")
    size = TASK.size
    shape = (
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        if augmented
        else [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    )
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return transforms.Compose([*shape, transforms.ToTensor(), normalize])


def _folder_content(root: Path) -> str:
    digest = hashlib.sha256()
    for part in ("train", "val"):
        for path in sorted((root / part).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _saved_content(splits: dict[str, SavedSplit]) -> str:
    digest = hashlib.sha256()
    for name, split in splits.items():
        digest.update(f"{name}\n".encode())
        for line in split.lines():
            digest.update(line.encode())
    return digest.hexdigest()[:16]


TASK = FolderTask(
    name="imagefolder",
    version=1,
    title="Pictures in a folder",
    load=load,
    digest=None,
    size=224,
    networks={},
    default_network="resnet50.tv_in1k",
    training={"default": FineTune(epochs=90, lr=0.1, weight_decay=1e-4, warmup=0.05)},
    augment=None,
    batch_size=256,
)
