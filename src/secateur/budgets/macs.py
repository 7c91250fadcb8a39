"""Cost in multiply-adds."""

from __future__ import annotations

from functools import singledispatch

from secateur.core.units import Cost, LinearCost, Units
from secateur.errors import NotApplicable
from secateur.measure.profile import count_macs
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.granularity.depth import DepthUnits
from secateur.parts.granularity.weight import WeightUnits
from secateur.structure.cost import ProductCost


@singledispatch
def macs_cost(units: Units) -> Cost:
    """Return the multiply-adds of one call of the example inputs (effective ones, where pruning only zeroes)."""
    raise NotApplicable(f"A budget in MACs is not defined for {type(units).__name__}.")


@macs_cost.register
def _(units: ChannelUnits) -> Cost:
    return ProductCost(units.structure, ((1, dims) for dims in units.structure.multiply_adds))


@macs_cost.register
def _(units: DepthUnits) -> Cost:
    return units.cost({branch.name: branch.macs for branch in units.structure.branches}, units.structure.macs({}))


@macs_cost.register
def _(units: WeightUnits) -> Cost:
    counted = count_macs(units.model, units.inputs)
    per_unit = {name: counted.by_parameter.get(name, 0) / shape.numel() for name, shape in units.shapes.items()}
    inside = sum(counted.by_parameter.get(name, 0) for name in units.shapes)
    return LinearCost(per_unit, fixed=counted.total - inside)
