"""The layers that read the units of axes, and which columns of their weights belong to which unit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from secateur.core.layers import columns_per_input, input_dim, is_matrix
from secateur.core.units import Kept, Units
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import ChannelUnits
from secateur.structure.dims import unit_index
from secateur.structure.structure import Axis


@dataclass(frozen=True)
class Reader:
    """A layer that reads the units of an axis.

    Attributes:
        name: Of its weight.
        layer: The layer.
        units: For each column of its weight as a matrix the unit that it multiplies; -1 for those of other axes.
    """

    name: str
    layer: nn.Module
    units: Tensor

    def places(self, size: int) -> Tensor:
        """Return the columns of each of `size` units, in order: shape (size, columns of a unit)."""
        return self.units.sort(stable=True).indices[self.units.lt(0).sum() :].view(size, -1)


def channel_units(units: Units, who: str) -> ChannelUnits:
    """Return units as units on axes.

    Raises:
        NotApplicable: They are something else; the message says that `who` cannot work on them.
    """
    if not isinstance(units, ChannelUnits):
        raise NotApplicable(f"{who} works on channels, heads or hidden units: choose such a granularity.")
    return units


def readers(units: ChannelUnits, axis: Axis) -> list[Reader]:
    """Return the linear and two-dimensional convolutional layers that read an axis."""
    found = []
    for name, position in axis.members:
        layer = units.model.get_submodule(name.rpartition(".")[0])
        if is_matrix(layer) and position == input_dim(layer) and units.consumes(name, position):
            index = unit_index(units.structure.tensors[name][position], axis.leaf)
            found.append(Reader(name, layer, index.repeat_interleave(columns_per_input(layer))))
    return found


def own_readers(units: ChannelUnits, axis: Axis) -> list[Reader]:
    """Return those of an axis' readers that share their weight with no other layer, so that it may change."""
    return [reader for reader in readers(units, axis) if not is_shared(units.model, reader.name)]


def is_shared(model: nn.Module, name: str) -> bool:
    """Return whether a parameter is that of several modules."""
    parameter = model.get_parameter(name)
    return sum(other is parameter for _, other in model.named_parameters(remove_duplicate=False)) > 1


def kept_columns(units: ChannelUnits, kept: Kept) -> dict[str, Tensor]:
    """Return which columns of the weights as matrices stay, for the readers that lose some: bool tensors, by weight."""
    columns: dict[str, Tensor] = {}
    for axis in units.structure.prunable:
        for reader in own_readers(units, axis):
            own = reader.units < 0
            own[~own] = kept[axis.name].cpu()[reader.units[~own]]
            columns[reader.name] = columns[reader.name] & own if reader.name in columns else own
    return {name: stay for name, stay in columns.items() if not stay.all()}
