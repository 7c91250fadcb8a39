"""Rectangular blocks of matrices as units: pruning sets them to zero and keeps them there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.slots import Granularity, Scope
from secateur.core.units import Kept, Limits, Scores
from secateur.parts.granularity.masked import MaskedUnits
from secateur.structure.inputs import Inputs, as_inputs

Side = Annotated[int, Field(ge=1)]


class Block(Granularity):
    """Each rectangular block of each kernel is a unit (Lagunas et al., EMNLP 2021: 32 x 32 blocks of linear layers).

    Kernels of convolutions are matrices of (outputs, inputs x kernel entries). Where a matrix cannot be divided, the
    blocks at its lower and right edges are smaller. Blocks of one matrix and one size form a group.

    Attributes:
        shape: Rows (outputs of the layer) and columns (its inputs) of a block.
        minimum: Fewest blocks that stay in each group: a small layer is one block, or two.
    """

    name = "block"
    shape: tuple[Side, Side] = (32, 32)
    minimum: int = Field(1, ge=0)

    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> BlockUnits:
        """Return the blocks of all kernels in scope as units."""
        return BlockUnits(model, as_inputs(example_inputs), scope, self.shape, self.minimum)


class _Part(NamedTuple):
    """The blocks of one size in a matrix, which lie side by side."""

    rows: slice
    columns: slice
    shape: tuple[int, int]

    @property
    def blocks(self) -> torch.Size:
        """How many blocks lie below one another, and side by side."""
        (height, width), (rows, columns) = self.shape, (self.rows, self.columns)
        return torch.Size([(rows.stop - rows.start) // height, (columns.stop - columns.start) // width])

    def grid(self, matrix: Tensor) -> Tensor:
        """Return these blocks of a matrix: shape (blocks down, rows of a block, blocks across, columns of a block)."""
        (height, width), (down, across) = self.shape, self.blocks
        return matrix[self.rows, self.columns].view(down, height, across, width)


class BlockUnits(MaskedUnits):
    """The blocks of a model's kernels."""

    def __init__(self, model: nn.Module, inputs: Inputs, scope: Scope, shape: tuple[int, int], minimum: int) -> None:
        super().__init__(model, inputs, scope, biases=False)
        self.limits = Limits(minimum)
        self._parts = {
            name: {f"{name}[{part.shape[0]}x{part.shape[1]}]": part for part in _parts(_matrix_shape(parameter), shape)}
            for name, parameter in self._parameters.items()
        }

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The number of blocks down and across."""
        return {group: part.blocks for parts in self._parts.values() for group, part in parts.items()}

    def groups_of(self, name: str) -> tuple[str, ...]:
        """Return the groups of blocks in a matrix: one for each size."""
        return tuple(self._parts[name])

    def size(self, group: str) -> int:
        """Return rows times columns."""
        return next(parts[group].shape[0] * parts[group].shape[1] for parts in self._parts.values() if group in parts)

    def sum(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Return sums over each block, whose entries are all consumed."""
        return {
            group: part.grid(values[name].flatten(1)).sum((1, 3))
            for name, parts in self._parts.items()
            for group, part in parts.items()
        }

    def entries(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return the value of each entry's block; gradients pass through."""
        parameter = self._parameters[name]
        found = next(iter(values.values())).new_empty(_matrix_shape(parameter))
        for group, part in self._parts[name].items():
            part.grid(found).copy_(values[group][:, None, :, None].expand(-1, part.shape[0], -1, part.shape[1]))
        return found.view(parameter.shape)

    def kept_in(self, masks: Mapping[str, Tensor]) -> Kept:
        """Return the blocks of which masks keep an entry; none if they are masks of another model."""
        if {name: mask.shape for name, mask in masks.items()} != {n: p.shape for n, p in self._parameters.items()}:
            return {}
        return {group: kept > 0 for group, kept in self.sum(masks).items()}


def _matrix_shape(kernel: Tensor) -> tuple[int, int]:
    """Return rows and columns of a kernel as a matrix."""
    return len(kernel), kernel[0].numel()


def _parts(matrix: tuple[int, int], shape: tuple[int, int]) -> Iterator[_Part]:
    """Yield the parts of a matrix: that of whole blocks, and those along its edges."""
    for down, height in _stretches(matrix[0], shape[0]):
        for across, width in _stretches(matrix[1], shape[1]):
            yield _Part(down, across, (height, width))


def _stretches(length: int, side: int) -> Iterator[tuple[slice, int]]:
    """Yield where the whole sides lie, and where what is left of a side lies, each with its length."""
    whole = length - length % side
    if whole:
        yield slice(0, whole), side
    if whole < length:
        yield slice(whole, length), length - whole
