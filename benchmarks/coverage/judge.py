"""The judge: does a pruned network compute what the dense one computes without the removed weights?

It does not ask the tool that pruned. Every entry of every weight of the dense network holds a value of its own
(`tag`), so the pruned network itself tells which entries it kept. The dense network with all other entries zeroed, and
with statistics such as LayerNorm's restricted to the units that remain, is what it has to compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import InvalidInputs
from secateur.structure.dims import Dim
from secateur.structure.inputs import call_with_state, relative_error, state_of, undisturbed
from secateur.structure.masked import run_masked

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
"""Parts of some networks compute in float32 even so, and some do not run in float64. Mistakes are far larger."""

Entries = Mapping[str, tuple[Tensor, ...]]
"""Tensor name -> for each dim, the indices of the dense tensor that the pruned network has."""


class ForeignTensor(Exception):
    """A pruned network holds a tensor that is no slice of the dense one."""


# --------------------------------------------------------------------------------------------------- the tags


def tag(model: nn.Module, seed: int = 0) -> None:
    """Give every entry of a weight a value that no other entry of the same tensor has; mutates `model`.

    The sizes are those of a network in use that does not amplify rounding: matrices of variance 1 / fan-in, vectors
    between 0.5 and 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tagged(model).values():
            order = torch.randperm(tensor.numel(), generator=generator, dtype=torch.int32)
            tensor.copy_(_distinct(order, tuple(tensor.shape)).view(tensor.shape))


def tagged(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the statistics of a network; tables and masks keep the values that they have."""
    return {
        name: tensor
        for name, tensor in state_of(model).items()
        if tensor.dtype == torch.float32
        and tensor.dim() > 0
        and tensor.numel() > 0
        and (isinstance(tensor, nn.Parameter) or (tensor.dim() == 1 and tensor.numel() > 1))
    }


def _distinct(order: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return one float32 per index: neighbours in the list of all floats, evenly spaced over a few octaves."""
    count, signed = order.numel(), len(shape) > 1
    if not signed:
        lowest, octaves = 0.5, 1
    else:
        lowest, octaves = (count / shape[0]) ** -0.5 / 7, 4
        count = (count + 1) // 2
    first = int(torch.tensor(lowest, dtype=torch.float32).view(torch.int32))
    step = max(octaves * 2**23 // count, 1)
    size = (first + (order // 2 if signed else order) * step).view(torch.float32)
    return torch.where(order % 2 == 0, size, -size) if signed else size


# ---------------------------------------------------------------------------------------------- what was kept


def survivors(dense: nn.Module, small: nn.Module) -> Entries:
    """Return which entries of the tagged tensors of `dense` the pruned network has.

    Raises:
        ForeignTensor: A tensor of `small` is no slice of the dense one.
    """
    own = {**dict(small.named_parameters(remove_duplicate=False)), **dict(small.named_buffers(remove_duplicate=False))}
    kept = {}
    for name, tensor in tagged(dense).items():
        if name not in own:
            raise ForeignTensor(f"{name} is gone")
        kept[name] = _entries(name, tensor.detach(), own[name].detach())
    return kept


def _entries(name: str, tensor: Tensor, part: Tensor) -> tuple[Tensor, ...]:
    """Find one entry, then the lines through it along each dim; the rest must follow."""
    place = torch.tensor([]) if part.numel() == 0 else (tensor == part.flatten()[0]).nonzero()
    if part.dim() != tensor.dim() or len(place) != 1:
        raise ForeignTensor(f"{name} of shape {tuple(part.shape)} holds other values than the dense tensor")
    origin = place[0].tolist()
    indices, slice_ = [], tensor
    for position in range(tensor.dim()):
        line = tensor[tuple(slice(None) if i == position else c for i, c in enumerate(origin))]
        own = part[tuple(slice(None) if i == position else 0 for i in range(part.dim()))]
        values, order = line.sort()
        indices.append(order[torch.searchsorted(values, own.contiguous()).clamp(max=len(values) - 1)])
        slice_ = slice_.index_select(position, indices[-1])
    if not torch.equal(slice_, part):
        raise ForeignTensor(f"{name} of shape {tuple(part.shape)} is no slice of the dense tensor")
    return tuple(indices)


def kept_units(structure: sc.Structure, entries: Entries) -> dict[str, Tensor]:
    """Return the units of each axis of which all members lost the same; other axes are not named."""
    votes: dict[Dim, list[Tensor | None]] = {}
    for name, indices in entries.items():
        for dim, index in zip(structure.tensors[name], indices, strict=True):
            mask = torch.zeros(dim.size, dtype=torch.bool)
            mask[index] = True
            _vote(dim, mask, votes)
    units = {}
    for axis in structure.axes:
        first, *others = votes.get(axis.leaf.find(), [None])
        if first is not None and bool(first.any()) and all(o is not None and torch.equal(o, first) for o in others):
            units[axis.name] = first
    return units


def _vote(dim: Dim, mask: Tensor | None, votes: dict[Dim, list[Tensor | None]]) -> None:
    """Tell every leaf of a dim which of its indices a mask over the dim keeps; None where that has no answer."""
    dim = dim.find()
    sizes = [part.size for part in dim.parts]
    if not dim.op:
        votes.setdefault(dim, []).append(mask)
    elif dim.op == "+":
        for part, own in zip(dim.parts, [None] * len(sizes) if mask is None else mask.split(sizes), strict=True):
            _vote(part, own, votes)
    else:
        grid = None if mask is None else mask.view(sizes)
        own_masks = [None if grid is None else grid.movedim(i, 0).flatten(1).any(1) for i in range(len(sizes))]
        whole = None if grid is None else prod(int(own.sum()) for own in own_masks if own is not None)
        for part, own in zip(dim.parts, own_masks, strict=True):
            _vote(part, own if grid is not None and whole == int(grid.sum()) else None, votes)


# ------------------------------------------------------------------------------------------------ the verdict


def judge(dense: nn.Module, small: nn.Module, structure: sc.Structure) -> tuple[bool, float]:
    """Return whether the pruned network is right, and its relative error; both networks end in float64 (or 32).

    The scale that attention takes by default follows its width. It is fixed in both networks, so that only what was
    removed is judged.

    Args:
        dense: The network before the cut, tagged.
        small: The network after the cut, not trained since.
        structure: What `sc.trace` says about `dense`; statistics are restricted along its axes.

    Raises:
        ForeignTensor: The pruned network holds a tensor that is no slice of the dense one.
        InvalidInputs: A network does not run.
    """
    entries = survivors(dense, small)
    units = kept_units(structure, entries)
    for dtype, tolerance in TOLERANCE.items():
        dense.to(dtype)
        small.to(dtype)
        inputs = structure.inputs.to(dtype)
        state = {name: _zeroed(tensor, entries.get(name, ())) for name, tensor in state_of(dense).items()}
        try:
            with _fixed_scale(), torch.no_grad():  # one after the other: both draw the same random numbers
                with undisturbed(dense):
                    expected = run_masked(dense, structure, units, state, inputs)
                with undisturbed(small):
                    error = relative_error(call_with_state(small, state_of(small), inputs), expected)
            return error <= tolerance, error
        except InvalidInputs:
            if dtype == torch.float32:
                raise
    raise AssertionError("unreachable")


def _zeroed(tensor: Tensor, indices: tuple[Tensor, ...]) -> Tensor:
    zeroed = tensor.detach().clone()
    for position, index in enumerate(indices):
        gone = torch.ones(tensor.shape[position], dtype=torch.bool)
        gone[index] = False
        zeroed.index_fill_(position, gone.nonzero().flatten(), 0.0)
    return zeroed.requires_grad_(tensor.requires_grad)  # PyTorch picks operations by this flag


@contextmanager
def _fixed_scale() -> Iterator[None]:
    original = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return original(*args, **{**kwargs, "scale": kwargs.get("scale") or 0.25})

    with patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield
