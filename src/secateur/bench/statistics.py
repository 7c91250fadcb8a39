"""Means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its confidence interval.

    Attributes:
        mean: The mean.
        half_width: So that mean - half_width .. mean + half_width covers the true mean; 0 for a single value.
        n: Number of values.
    """

    mean: float
    half_width: float
    n: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return mean and confidence interval (Student's t) of independent values.

    Example:
        >>> interval([1.0, 2.0, 3.0]).mean
        2.0
    """
    n = len(values)
    if n == 0:
        raise ValueError("An interval needs at least one value.")
    if n == 1:
        return Interval(values[0], 0.0, 1)
    t = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return Interval(fmean(values), t * stdev(values) / sqrt(n), n)
