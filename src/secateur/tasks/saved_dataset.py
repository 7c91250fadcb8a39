"""Pictures that the library ``datasets`` of Hugging Face saved to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import DataUnavailable, InvalidFile
from secateur.optional import optional_import

MARKS = ("dataset_dict.json", "state.json")
"""What ``DatasetDict.save_to_disk`` and ``Dataset.save_to_disk`` leave in their folder."""
UNLABELED = -1
"""The class that stands for none, as in the test split of ImageNet."""


@dataclass(frozen=True)
class SavedSplit:
    """One split; its columns are those of picture and class."""

    rows: Any
    image: str
    label: str

    @cached_property
    def targets(self) -> Tensor:
        """The class of each picture."""
        return torch.tensor([label for _, _, label in self._facts()], dtype=torch.long)

    @property
    def is_labeled(self) -> bool:
        """Whether there are pictures, and each has a class."""
        return len(self.targets) > 0 and int(self.targets.min()) > UNLABELED

    def pictures(self, transform: Callable[[Any], Any]) -> SavedPictures:
        """Return the pictures as they are seen through a transform, with their classes."""
        return SavedPictures(self, transform)

    def lines(self) -> Iterator[str]:
        """Yield the classes, then name, size and class of each picture."""
        yield f"{self.rows.features[self.label].names}\n"
        for name, size, label in self._facts():
            yield f"{name} {size} {label}\n"

    def _facts(self) -> Iterator[tuple[str | None, int | None, int]]:
        """Yield name, bytes and class of each picture, none of which is decoded or even read."""
        compute = optional_import("pyarrow.compute", "datasets")
        for batch in self.rows.with_format("arrow")[:].to_batches():
            column = batch.column(self.image)
            sizes = compute.binary_length(compute.struct_field(column, "bytes"))
            labels = batch.column(self.label).fill_null(UNLABELED)
            yield from zip(
                compute.struct_field(column, "path").to_pylist(), sizes.to_pylist(), labels.to_pylist(), strict=True
            )


@dataclass(frozen=True)
class SavedPictures:
    """Pictures and classes by index, as a loader wants them."""

    split: SavedSplit
    transform: Callable[[Any], Any]

    def __len__(self) -> int:
        return len(self.split.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.split.rows[index]
        return self.transform(row[self.split.image].convert("RGB")), row[self.split.label]


def is_saved(folder: Path) -> bool:
    """Return whether ``datasets`` wrote this folder."""
    return any((folder / mark).is_file() for mark in MARKS)


def open_saved(folder: Path) -> dict[str, SavedSplit]:
    """Return the splits of a saved ``DatasetDict`` by their names; nothing is downloaded.

    Raises:
        DataUnavailable: It is a ``Dataset`` without splits, or has not one column of pictures and one of classes.
        InvalidFile: It cannot be read.
        MissingDependency: ``datasets`` is not installed.
    """
    datasets: Any = optional_import("datasets", "datasets")
    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidFile(f"{folder} is no dataset that `datasets` can load: {error}. Save it anew.") from error
    if not isinstance(found, datasets.DatasetDict):
        raise DataUnavailable(
            f"{folder} is a Dataset without splits; expected a DatasetDict with train, and validation or test: "
            "Dataset.train_test_split() makes one."
        )
    return {name: _split(folder / name, rows, datasets) for name, rows in found.items()}


def _split(place: Path, rows: Any, datasets: Any) -> SavedSplit:
    def only(kind: Any) -> str:
        names: list[str] = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        if len(names) != 1:
            raise DataUnavailable(
                f"{place} has {len(names)} columns of type {kind.__name__}; expected one. "
                f"Columns: {', '.join(f'{name} ({type(f).__name__})' for name, f in rows.features.items())}; "
                "cast_column and remove_columns change them."
            )
        return names[0]

    image, label = only(datasets.Image), only(datasets.ClassLabel)
    return SavedSplit(rows.select_columns([image, label]), image, label)
