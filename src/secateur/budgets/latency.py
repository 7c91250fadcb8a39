"""Cost in measured time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch

from secateur.core.units import Cost, Units
from secateur.errors import NotApplicable
from secateur.measure.latency import measure_latency
from secateur.parts.granularity.channel import ChannelUnits
from secateur.structure.surgery import cut_copy, make_plan


@singledispatch
def latency_cost(units: Units) -> Cost:
    """Return the median time of one call of the example inputs, in milliseconds (PyTorch eager)."""
    raise NotApplicable(
        f"A latency budget needs units that are removed physically; {type(units).__name__} only zeroes weights, "
        "and zeros are as slow as other numbers. Use granularity='channel'."
    )


@latency_cost.register
def _(units: ChannelUnits) -> Cost:
    structure = units.structure

    def cost(counts: Mapping[str, int]) -> float:
        """Time a network of these widths; which units it keeps does not matter."""
        kept = {name: torch.arange(structure.axis(name).size) < count for name, count in counts.items()}
        small = cut_copy(units.model, make_plan(structure, kept))
        return measure_latency(small, structure.inputs).p50_ms

    return cost
