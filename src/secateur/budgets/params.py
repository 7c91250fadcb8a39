"""Cost in parameters, and in units."""

from __future__ import annotations

from functools import singledispatch

from secateur.core.units import Cost, LinearCost, Units
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.granularity.depth import DepthUnits
from secateur.parts.granularity.masked import MaskedUnits
from secateur.structure.cost import ProductCost


def units_cost(units: Units) -> Cost:
    """Return the number of kept units."""
    return LinearCost(dict.fromkeys(units.shapes, 1.0))


@singledispatch
def params_cost(units: Units) -> Cost:
    """Return the number of parameters that are left (of non-zero ones, where pruning only zeroes)."""
    raise NotApplicable(f"A budget in parameters is not defined for {type(units).__name__}.")


@params_cost.register
def _(units: ChannelUnits) -> Cost:
    structure = units.structure
    return ProductCost(structure, ((1, structure.tensors[name]) for name in structure.parameters))


@params_cost.register
def _(units: DepthUnits) -> Cost:
    parameters = units.structure.parameters
    sizes = {
        b.name: sum(n for name, n in units.numel(b).items() if name in parameters) for b in units.structure.branches
    }
    return units.cost(sizes, units.structure.params({}))


@params_cost.register
def _(units: MaskedUnits) -> Cost:
    total = sum(p.numel() for p in units.model.parameters())
    prunable = sum(p.numel() for p in units.parameters().values())
    return LinearCost({group: float(units.size(group)) for group in units.shapes}, fixed=total - prunable)
