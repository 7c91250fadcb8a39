"""Cost in measured time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, singledispatch

import torch

from secateur.core.units import Cost, Units
from secateur.errors import NotApplicable
from secateur.measure.latency import compare_latency, measure_latency
from secateur.parts.granularity.cut import CutUnits
from secateur.structure.surgery import cut_copy


@singledispatch
def latency_cost(units: Units) -> Cost:
    """Return the median time of one call of the example inputs, in milliseconds (PyTorch eager)."""
    raise NotApplicable(
        f"A latency budget needs units that are removed physically; {type(units).__name__} keeps all weights, and "
        "zeros are as slow as other numbers. Use granularity='channel'."
    )


@latency_cost.register
def _(units: CutUnits) -> Cost:
    model, inputs, sizes = units.model, units.inputs, {group: shape.numel() for group, shape in units.shapes.items()}
    whole = measure_latency(model, inputs).p50_ms

    @cache
    def shares(counts: tuple[tuple[str, int], ...]) -> float:
        small = cut_copy(model, units.plan_of({group: torch.arange(sizes[group]) < count for group, count in counts}))
        both = compare_latency({"whole": model, "small": small}, inputs)
        return both["small"].p50_ms / both["whole"].p50_ms

    def cost(counts: Mapping[str, int]) -> float:
        """Time a network of these sizes beside the whole one, so that a machine's moods cancel out."""
        if all(count == sizes[group] for group, count in counts.items()):
            return whole
        return whole * shares(tuple(counts.items()))

    return cost
