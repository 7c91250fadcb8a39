"""Cost in multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

from secateur.core.units import Cost, LinearCost, Units
from secateur.errors import NotApplicable
from secateur.measure.conditional import Wiring
from secateur.measure.profile import count_macs
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.granularity.channel_per_input import GatedUnits
from secateur.parts.granularity.depth import DepthUnits
from secateur.parts.granularity.masked import MaskedUnits
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
def _(units: MaskedUnits) -> Cost:
    counted = count_macs(units.model, units.inputs)
    per_unit = {
        group: counted.by_parameter.get(name, 0) / parameter.numel() * units.size(group)
        for name, parameter in units.parameters().items()
        for group in units.groups_of(name)
    }
    inside = sum(counted.by_parameter.get(name, 0) for name in units.parameters())
    return LinearCost(per_unit, fixed=counted.total - inside)


@macs_cost.register
def _(units: GatedUnits) -> Cost:
    counted, wiring = count_macs(units.model, units.inputs), Wiring(units.model, units.inputs)
    whole = {path: gate.convolution.out_channels for path, gate in units.gates.items()}
    of_predictors = sum(counted.by_parameter[f"{path}.saliency.weight"] for path in whole)

    def cost(counts: Mapping[str, int]) -> float:
        """Return what any input takes at most; the network in which all channels win is the one without gates."""
        winners = {**whole, **counts}
        if winners == whole:
            return counted.total - of_predictors
        shares = wiring.shares(winners).items()
        return counted.total - sum(counted.by_parameter[name] * (1 - share) for name, share in shares)

    return cost
