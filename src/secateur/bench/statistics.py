"""Comparisons of a few runs: intervals, paired differences, fronts, ranks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import sqrt
from random import Random
from statistics import fmean
from typing import Literal

from scipy import stats

_RESAMPLES = 10_000
_ENUMERATED = 50_000
"""Up to so many resamples are all taken, so that the interval is exact: up to 6 values."""


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

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width


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
    mean = fmean(values)
    deviation = sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, _student(n - 1, confidence) * deviation / sqrt(n), n)


@cache
def _student(freedom: int, confidence: float) -> float:
    """Return how many standard errors the interval is wide; SciPy takes as long for it as for all the rest."""
    return float(stats.t.ppf((1 + confidence) / 2, freedom))


def bootstrap(values: Sequence[float], confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean (Efron 1979): exact for up to 6 values.

    With three values it is simply their range, and covers the true mean less often than it says; `interval` does not.

    Example:
        >>> bootstrap([1.0, 2.0, 3.0])
        (1.0, 3.0)
    """
    n = len(values)
    if n == 0:
        raise ValueError("A bootstrap needs at least one value.")
    if n**n <= _ENUMERATED:
        means = sorted(fmean(sample) for sample in product(values, repeat=n))
    else:
        random = Random(seed)
        means = sorted(fmean(random.choices(values, k=n)) for _ in range(_RESAMPLES))
    outside = int(len(means) * (1 - confidence) / 2)
    return means[outside], means[-1 - outside]


@dataclass(frozen=True)
class Paired:
    """How much higher one arm is than another, seed by seed.

    Attributes:
        difference: Mean and interval (Student's t) of the differences.
        low: Lower end of the bootstrap interval.
        high: Its upper end.
    """

    difference: Interval
    low: float
    high: float

    @property
    def verdict(self) -> Literal["better", "worse", "undecided"]:
        """What the interval says; a single pair of runs decides nothing."""
        if self.difference.n < 2 or self.difference.low <= 0 <= self.difference.high:
            return "undecided"
        return "better" if self.difference.mean > 0 else "worse"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Paired | None:
    """Return the comparison of two arms over the seeds that both have; None if there is none.

    Runs of equal seed share the dense network, the order of the data and the augmentation.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    return Paired(interval(differences), *bootstrap(differences))


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, value) that no other point beats, from the cheapest on.

    A point is beaten by one that costs no more and is worth no less, and differs.

    Example:
        >>> pareto_front([(1, 5), (2, 4), (3, 6)])
        [0, 2]
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def hypervolume(points: Iterable[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Return the area of all (cost, value) that some point beats, up to the cost and down to the value of `reference`.

    Example:
        >>> hypervolume([(1, 2), (2, 3)], reference=(4, 0))
        8.0
    """
    worst_cost, worst_value = reference
    inside = [point for point in points if point[0] < worst_cost and point[1] > worst_value]
    front = [inside[index] for index in pareto_front(inside)]
    ends = [*(cost for cost, _ in front), worst_cost][1:]
    return float(sum((end - cost) * (value - worst_value) for (cost, value), end in zip(front, ends, strict=True)))


def ranks(intervals: Mapping[str, Interval]) -> dict[str, int]:
    """Return the rank of each arm: 1 + the number of arms whose interval lies above its own.

    Arms whose intervals overlap do not count against each other, nor do single runs, so ranks tie where nothing is
    decided.
    """
    lows = sorted(interval.low for interval in intervals.values() if interval.n > 1)
    return {name: 1 + (len(lows) - bisect_right(lows, own.high) if own.n > 1 else 0) for name, own in intervals.items()}
