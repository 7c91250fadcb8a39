"""Which weights of a sparse network still matter.

A weight that is not zero is without effect if its unit gets nothing (all weights into it are zero) or gives nothing
(all weights out of it are): no path from the input to the output leads through it (Vysogorets & Kempe,
arXiv 2107.02306). At high sparsity that is a large part of what is left.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.slots import Scope
from secateur.parts.granularity.channel import ChannelUnits
from secateur.structure.dims import unit_index
from secateur.structure.inputs import as_inputs
from secateur.structure.structure import Axis


@dataclass(frozen=True)
class Effective:
    """What of a sparse network has an effect.

    Attributes:
        weights: Weights that are not zero and lie on a path from the input to the output, by tensor.
        cut_off: Units without such a path, by axis; axes that have none are left out.
    """

    weights: Mapping[str, int]
    cut_off: Mapping[str, int]

    @property
    def params(self) -> int:
        """All parameters that have an effect."""
        return sum(self.weights.values())


def effective_params(model: nn.Module, example_inputs: Any) -> int:
    """Return the number of parameters that are not zero and lie on a path from the input to the output.

    Units are those of the free axes: what a network does not let one cut counts as being on a path.

    Raises:
        StructureError: The axes of the network could not be proved.
    """
    return effective(model, example_inputs).params


def effective(model: nn.Module, example_inputs: Any) -> Effective:
    """Return which weights and units lie on a path from the input to the output; see `effective_params`."""
    units = ChannelUnits(copy.deepcopy(model), as_inputs(example_inputs), Scope())
    units.prove_analysis()
    alive = {name: (parameter != 0).cpu() for name, parameter in model.named_parameters()}
    before, dead = -1, dict.fromkeys(units.shapes, 0)
    while (left := _count(alive)) != before:
        before = left
        for axis in units.structure.prunable:
            dead[axis.name] = _bury(axis, units, alive)
    weights = {name: int(mask.sum()) for name, mask in alive.items()}
    return Effective(weights, {name: count for name, count in dead.items() if count})


def _bury(axis: Axis, units: ChannelUnits, alive: dict[str, Tensor]) -> int:
    """Mark all parameters of the axis's dead units as dead and return how many units are; changes `alive`."""
    places = [(name, position) for name, position in axis.members if name in alive]
    kernels = [(name, position) for name, position in places if alive[name].dim() > 1]
    readers = [place for place in kernels if units.consumes(*place)]
    writers = [place for place in kernels if place not in readers]
    dead = torch.zeros(axis.size, dtype=torch.bool)
    for group in (readers, writers):
        if group:
            dead |= sum(_living(axis, units, alive, place) for place in group) == 0
    for name, position in places:
        index = unit_index(units.structure.tensors[name][position], axis.leaf)
        gone = (index >= 0) & dead[index.clamp_min(0)]
        alive[name].movedim(position, 0)[gone] = False
    return int(dead.sum())


def _living(axis: Axis, units: ChannelUnits, alive: dict[str, Tensor], place: tuple[str, int]) -> Tensor:
    """Return how many living weights each unit has in one tensor."""
    name, position = place
    each = alive[name].movedim(position, 0).flatten(1).sum(1)
    index = unit_index(units.structure.tensors[name][position], axis.leaf)
    inside = index >= 0
    return torch.zeros(axis.size, dtype=torch.long).index_add_(0, index[inside], each[inside])


def _count(alive: dict[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in alive.values())
