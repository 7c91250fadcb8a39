"""Connection sensitivity: how much the loss changes with a unit's factor (Lee, Ajanthan, Torr, ICLR 2019, eq. 4)."""

from __future__ import annotations

from secateur.core.context import Context, Values
from secateur.core.units import Scores


def sensitivity(context: Context, weights: Values, gradients: Values) -> Scores:
    """Return |sum of theta g| over each unit, which for a single weight is |dL/dc| of its factor c = 1.

    Args:
        context: Its units are scored.
        weights: theta, by parameter.
        gradients: g, by parameter; they need not be those at `weights`.
    """
    slopes = context.sum_over_units({name: weight * gradients[name] for name, weight in weights.items()}, consumed=True)
    return {group: slope.abs() for group, slope in slopes.items()}
