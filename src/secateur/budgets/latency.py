"""Cost in measured time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, singledispatch

import torch

from secateur.core.units import Cost, Units
from secateur.errors import NotApplicable
from secateur.measure.latency import compare_latency, measure_latency
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
    structure, model = units.structure, units.model
    whole = measure_latency(model, structure.inputs).p50_ms

    @cache
    def shares(widths: tuple[tuple[str, int], ...]) -> float:
        kept = {name: torch.arange(structure.axis(name).size) < count for name, count in widths}
        small = cut_copy(model, make_plan(structure, kept))
        both = compare_latency({"whole": model, "small": small}, structure.inputs)
        return both["small"].p50_ms / both["whole"].p50_ms

    def cost(counts: Mapping[str, int]) -> float:
        """Time a network of these widths beside the whole one, so that a machine's moods cancel out."""
        if all(count == structure.axis(name).size for name, count in counts.items()):
            return whole
        return whole * shares(tuple(counts.items()))

    return cost
