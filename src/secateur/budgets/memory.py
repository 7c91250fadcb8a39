"""Cost in bytes of parameters and buffers."""

from __future__ import annotations

from functools import singledispatch

from secateur.core.units import Cost, Units
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.granularity.depth import DepthUnits
from secateur.structure.cost import ProductCost
from secateur.structure.inputs import state_of


@singledispatch
def bytes_cost(units: Units) -> Cost:
    """Return the size of the tensors that are left."""
    raise NotApplicable(
        f"A budget in bytes needs units that are removed physically; {type(units).__name__} keeps all weights stored. "
        "Use granularity='channel', or a budget in sparsity or params."
    )


@bytes_cost.register
def _(units: ChannelUnits) -> Cost:
    structure = units.structure
    item_sizes = {name: tensor.element_size() for name, tensor in state_of(units.model).items()}
    return ProductCost(structure, ((item_sizes[name], dims) for name, dims in structure.tensors.items()))


@bytes_cost.register
def _(units: DepthUnits) -> Cost:
    tensors = state_of(units.model)
    sizes = {
        b.name: sum(n * tensors[name].element_size() for name, n in units.numel(b).items())
        for b in units.structure.branches
    }
    return units.cost(sizes, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()))
