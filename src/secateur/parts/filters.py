"""Filters: all weights that produce a unit, as one vector per unit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.parts.granularity.channel import ChannelUnits
from secateur.structure.dims import unit_index
from secateur.structure.structure import Axis


def producers(units: ChannelUnits, axis: Axis) -> list[tuple[str, int]]:
    """Return the kernels (name, dim) that write an axis: several where layers share it, like a residual stream."""
    structure = units.structure
    kernels = [(n, dim) for n, dim in axis.members if n in structure.parameters and len(structure.tensors[n]) > 1]
    return [place for place in kernels if not units.consumes(*place)]


def filters(units: ChannelUnits, axis: Axis, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the weights that produce each unit, those of all kernels in a row: shape (units, weights), in float64."""
    found = [slices(units, axis, name, position, weights[name]) for name, position in producers(units, axis)]
    return torch.cat(found, 1) if found else torch.zeros(axis.size, 0, dtype=torch.float64)


def slices(units: ChannelUnits, axis: Axis, name: str, position: int, values: Tensor) -> Tensor:
    """Return the entries of one tensor that belong to each unit of an axis: shape (units, entries), in float64."""
    index = unit_index(units.structure.tensors[name][position], axis.leaf).to(values.device)
    places = index.sort(stable=True).indices[index.lt(0).sum() :]  # in the order of units, without other axes' places
    picked = values.detach().double().movedim(position, 0)[places]
    return picked.reshape(axis.size, -1)
