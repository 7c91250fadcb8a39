"""Consumers: the layers that read the units of axes, and which columns of their weights belong to which unit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.core.layers import columns_per_input, input_dim, is_matrix
from secateur.core.units import Kept, Units
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import ChannelUnits
from secateur.structure.dims import mask_under, unit_index
from secateur.structure.structure import Axis


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the units of an axis.

    Attributes:
        name: Of its weight.
        layer: The layer.
        units: For each column of its weight as a matrix the unit that it multiplies; -1 for those of other axes.
    """

    name: str
    layer: nn.Module
    units: Tensor


def channel_units(units: Units, who: str) -> ChannelUnits:
    """Return units as units on axes.

    Raises:
        NotApplicable: They are something else; the message says that `who` cannot work on them.
    """
    if not isinstance(units, ChannelUnits):
        raise NotApplicable(f"{who} works on channels, heads or hidden units: choose such a granularity.")
    return units


def consumers(units: ChannelUnits, axis: Axis) -> list[Consumer]:
    """Return the layers that read an axis.

    Raises:
        NotApplicable: Nothing reads it (queries and keys are multiplied with each other), or a layer of another kind
            than linear and two-dimensional convolutional.
    """
    found = []
    for name, position in axis.members:
        if not units.consumes(name, position):
            continue
        layer = units.model.get_submodule(name.rpartition(".")[0])
        if not is_matrix(layer):
            raise NotApplicable(
                f"The axis {axis.name!r} is read by a {type(layer).__name__}, not by a linear or two-dimensional "
                "convolutional layer. Exclude the axis from the scope."
            )
        index = unit_index(units.structure.tensors[name][position], axis.leaf)
        found.append(Consumer(name, layer, index.repeat_interleave(columns_per_input(layer))))
    if not found:
        raise NotApplicable(f"No layer reads the axis {axis.name!r}; exclude it from the scope.")
    return found


def kept_columns(units: ChannelUnits, kept: Kept) -> dict[str, Tensor]:
    """Return which columns of the weights as matrices stay, for the layers that lose some: bool tensors, by weight.

    Left out are layers of other kinds than linear and two-dimensional convolutional, and those that share their weight
    with another one.
    """
    masks = units.structure.masks(kept)
    places = Counter(id(p) for _, p in units.model.named_parameters(remove_duplicate=False))
    columns = {}
    for axis in units.structure.prunable:
        for name, position in axis.members:
            layer = units.model.get_submodule(name.rpartition(".")[0])
            if is_matrix(layer) and position == input_dim(layer) and units.consumes(name, position):
                stay = mask_under(units.structure.tensors[name][position], masks)
                if not stay.all() and places[id(units.model.get_parameter(name))] == 1:
                    columns[name] = stay.repeat_interleave(columns_per_input(layer))
    return columns


def over_units(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return sums of the entries of a square matrix over the pairs of units that they belong to.

    Args:
        values: Shape (columns, columns).
        index: The unit of each column, or -1.
        size: Number of units.

    Returns:
        Shape (size, size).
    """
    inside = (index >= 0).to(values.device)
    unit = index.to(values.device)[inside]
    rows = values.new_zeros(size, values.shape[1]).index_add_(0, unit, values[inside])
    return values.new_zeros(size, size).index_add_(1, unit, rows[:, inside])
