"""Several methods on one network, data and budget, with the same recovery: which one, and how sure is that?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.api import prune
from secateur.bench.measurements import timings
from secateur.bench.records import Timing
from secateur.bench.statistics import Interval, Paired, interval, paired, ranks
from secateur.core import registry
from secateur.core.batches import Data, Loss
from secateur.core.budget import Budget
from secateur.core.method import method as find_method
from secateur.core.recipe import Recipe
from secateur.core.slots import Precision
from secateur.errors import DataNeeded, InvalidRecipe, SecateurError, UnknownName
from secateur.measure.figures import Point, tradeoff_figure
from secateur.measure.latency import available_engines
from secateur.measure.report import MINUS, Page, Section, Table, collapses_warning, percentage
from secateur.pruned import Pruned
from secateur.training.loop import Evaluate, OnStep, accuracy
from secateur.training.teacher import Teachers

BASELINE = "random"

OnRun = Callable[[str, int], OnStep | None]
"""Called with (method, seed) before each run; returns what is called after each of its training steps."""


@dataclass(frozen=True)
class Candidate:
    """One method's runs.

    Attributes:
        method: Its name.
        values: The metric of the pruned network, by seed.
        pruned: The result for the first seed; None if the method failed.
        latency: Of that network beside the dense one; None if it did not become smaller.
        error: Why the method failed, if it did.
    """

    method: str
    values: Mapping[int, float]
    pruned: Pruned | None
    latency: Timing | None
    error: str = ""

    @property
    def value(self) -> Interval:
        """Mean and 95 % interval over the seeds."""
        return interval(list(self.values.values()))

    @property
    def effective_sparsity(self) -> float | None:
        """For the first seed's masks: see `secateur.pruned.Pruned.effective_sparsity`; None for smaller networks."""
        return self.pruned.effective_sparsity if self.pruned is not None and self.pruned.masks else None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        budget: What every method had to meet.
        dense: The metric of the unpruned network.
        candidates: The methods, the best mean first; those that failed at the end.
        share: Whether the metric is a share, such as the accuracy, and shown in percent.
    """

    budget: Budget
    dense: float
    candidates: tuple[Candidate, ...]
    share: bool = True

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """The methods that have a result."""
        return tuple(candidate for candidate in self.candidates if candidate.pruned is not None)

    @property
    def best(self) -> Candidate:
        """The method with the best mean.

        Raises:
            InvalidRecipe: Every method failed.
        """
        if not self.ranked:
            failed = "; ".join(f"{c.method}: {c.error}" for c in self.candidates)
            raise InvalidRecipe(f"No method met the budget of {self.budget}. {failed}")
        return self.ranked[0]

    def against(self, method: str, other: str) -> Paired:
        """Return how much better one method is than another, paired by seed."""
        by_name = {candidate.method: candidate for candidate in self.ranked}
        found = paired(by_name[method].values, by_name[other].values)
        assert found is not None  # all have the same seeds
        return found

    @property
    def recommendation(self) -> str:
        """Which method, and how sure that is, in words."""
        best = self.best
        dense = self._number(self.dense) + self._unit
        words = [f"{best.method}: {self._interval(best.value)}{self._unit}, the dense network has {dense}."]
        if best.value.n == 1:
            return " ".join([*words, "One seed decides nothing: compare at least three."])
        if len(self.ranked) == 1:
            return " ".join([*words, "No other method has a result."])
        equals = [c.method for c in self.ranked[1:] if self.against(best.method, c.method).verdict == "undecided"]
        if best.method == BASELINE or BASELINE in equals:
            words.append(self._not_above_random(equals))
        elif any(c.method == BASELINE for c in self.ranked):
            difference = self.against(best.method, BASELINE).difference
            mean, low, high = map(self._number, (difference.mean, difference.low, difference.high))
            words.append(f"{mean}{' points' if self.share else ''} above random pruning ({low} to {high}).")
        rivals = [name for name in equals if name != BASELINE]
        if rivals:
            words.append(f"Not told apart from it over {best.value.n} seeds: {', '.join(rivals)}.")
        return " ".join(words)

    def _not_above_random(self, equals: Sequence[str]) -> str:
        """Return what follows where the best method is random pruning, or not told apart from it."""
        verdicts = {c.method: self.against(c.method, BASELINE).verdict for c in self.ranked}
        better, worse = ([name for name, v in verdicts.items() if v == sought] for sought in ("better", "worse"))
        if better:
            words = f"{self.best.method} is not decidedly better than random pruning here; "
            words += f"decidedly better: {', '.join(better)}"
        else:
            words = "No method is decidedly better than random pruning here"
        if worse:
            words += f"; decidedly worse: {', '.join(worse)}"
        if not better and not worse and len(equals) == len(self.ranked) - 1:
            return f"{words}; the choice hardly matters."
        take = (better or [self.best.method])[0]
        return f"{words}. Take {take}, or compare other methods, another budget or another recovery."

    def table(self) -> Table:
        """Return one row per method."""
        ranked = ranks({candidate.method: candidate.value for candidate in self.ranked})
        metric, above = ("accuracy", "points above random") if self.share else ("metric", "above random")
        head = ["rank", "method", metric, above, "parameters", "MACs", "latency"]
        head += ["effective sparsity"] if self._masked else []
        rows = []
        for candidate in self.candidates:
            if candidate.pruned is None:
                rows.append(["", candidate.method, f"failed: {candidate.error}", *[""] * (len(head) - 3)])
                continue
            difference = self.against(candidate.method, BASELINE).difference if BASELINE in ranked else None
            apart = self._interval(difference, "+") if difference else ""
            after, timing = candidate.pruned.after, candidate.latency
            rows.append(
                [
                    str(ranked[candidate.method]),
                    candidate.method,
                    self._interval(candidate.value) + self._unit,
                    "" if candidate.method == BASELINE else apart,
                    f"{after.nonzero_params:,}",
                    f"{after.effective_macs:,}",
                    f"{timing.pruned.p50_ms:.2f} ms ({timing.dense.p50_ms / timing.pruned.p50_ms:.2f}x)"
                    if timing
                    else "",
                    *([percentage(candidate.effective_sparsity)] if self._masked else []),
                ]
            )
        return Table(head, rows, strong=0, text_columns=(1,))

    def _number(self, value: float, sign: str = "") -> str:
        """Return a figure of the metric in words: a share in percent, any other to five digits."""
        text = f"{100 * value:{sign}.2f}" if self.share else f"{value:{sign}.5g}"
        return text.replace("-", MINUS)

    def _interval(self, value: Interval, sign: str = "") -> str:
        spread = f" ± {self._number(value.half_width)}" if value.n > 1 else ""
        return self._number(value.mean, sign) + spread

    @property
    def warning(self) -> str:
        """What it means that nothing of some layers has an effect (layer collapse); empty if there are none."""
        return collapses_warning({c.method: c.pruned.collapsed for c in self.ranked if c.pruned is not None})

    @property
    def _masked(self) -> bool:
        return any(c.pruned is not None and c.pruned.masks for c in self.ranked)

    @property
    def _unit(self) -> str:
        return " %" if self.share else ""

    def report(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return a page with recommendation, table and plot as HTML that works offline, and write it to `path`."""
        against = f"{'Accuracy' if self.share else 'Metric'} against cost"
        page = Page(
            title="secateur: comparison",
            headline=f"{self.best.method} at a budget of {self.budget}",
            subtitle=self.recommendation,
            sections=[
                Section("Methods", self.warning, self.table(), caption=_CAPTION + (_MASKED if self._masked else "")),
                Section(against, figure=self._figure(), caption="Bars: 95 % intervals over the seeds."),
            ],
        )
        if path is not None:
            page.write(path)
        return page.html()

    def _figure(self) -> str:
        scale = 100 if self.share else 1
        series = {}
        for candidate in self.ranked:
            assert candidate.pruned is not None
            value, macs = candidate.value, candidate.pruned.after.effective_macs / 1e6
            note = f"{value.n} seed{'s' if value.n > 1 else ''}"
            series[candidate.method] = [Point(macs, scale * value.mean, scale * value.half_width, note)]
        assert self.best.pruned is not None
        dense = Point(self.best.pruned.before.macs / 1e6, scale * self.dense)
        title = "accuracy (%)" if self.share else "metric"
        return tradeoff_figure(series, "multiply-adds (millions)", title, dense)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "budget": self.budget.model_dump(exclude_none=True),
            "dense": self.dense,
            "recommendation": self.recommendation,
            "methods": [
                {
                    "method": candidate.method,
                    "values": {str(seed): value for seed, value in candidate.values.items()},
                    "about": candidate.pruned.about() if candidate.pruned else None,
                    "effective_sparsity": candidate.effective_sparsity,
                    "collapsed": candidate.pruned.collapsed if candidate.pruned else (),
                    "latency": candidate.latency.model_dump() if candidate.latency else None,
                    "error": candidate.error or None,
                }
                for candidate in self.candidates
            ],
        }


_CAPTION = (
    "± is the 95 % interval over the seeds (Student's t); differences are paired by seed. Methods whose intervals "
    "overlap share a rank. Every method had the same budget, recovery and data. The figures chose the winner, so its "
    "own is a little too good: measure it once more on data that nothing was chosen by."
)
_MASKED = (
    " Effective sparsity, of the first seed: the share of the parameters that are zero or cut off from the output."
)


def compare(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: Budget,
    data: Data | None = None,
    validation: Data | None = None,
    metric: Evaluate | None = None,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    loss: Loss | None = None,
    precision: Precision = "32-true",
    teachers: Teachers = (),
    engine: str = "eager",
    on_run: OnRun | None = None,
    **slots: Any,
) -> Comparison:
    """Return a comparison of several methods at one budget, with random pruning among them.

    Args:
        model: The trained network; never changed.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        budget: How much may stay.
        data: Training batches, for scores and for the recovery.
        validation: Batches on which the methods are compared; the training must not see them.
        metric: What is compared instead of the accuracy on `validation`; higher is better. Shown as it is, not in
            percent.
        methods: Names; default: all for trained networks that have the granularity. Random pruning is always added.
        seeds: One run of each method per seed.
        loss: (output, target) -> scalar; default: the model's own for mappings, else cross-entropy.
        precision: Of the recovery.
        teachers: Of the recovery, beside `model`; see `secateur.prune`.
        engine: In which the networks are timed.
        on_run: Called before each run, for progress bars.
        **slots: Answers to a recipe's questions that hold for every method: granularity, recovery, schedule ...

    Raises:
        DataNeeded: Neither `validation` nor `metric`.
        UnknownName: A method that does not exist, or an engine that is not installed.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> batches = [(torch.randn(16, 8), torch.randint(4, (16,)))]
        >>> found = compare(net, torch.zeros(1, 8), budget=Budget(macs=0.5), granularity="channel",
        ...                 validation=batches, methods=["magnitude"])
        >>> sorted(candidate.method for candidate in found.candidates)
        ['magnitude', 'random']
    """
    if validation is None and metric is None:
        raise DataNeeded("A comparison needs validation= (batches that the training does not see), or metric=.")
    if engine not in available_engines():
        raise UnknownName("engine", engine, available_engines())
    evaluate = metric or accuracy(validation)  # type: ignore[arg-type]

    def runs_of(name: str) -> Candidate:
        values: dict[int, float] = {}
        first: Pruned | None = None
        try:
            for seed in seeds:
                pruned = prune(
                    model,
                    example_inputs,
                    method=name,
                    budget=budget,
                    data=data,
                    loss=loss,
                    on_step=on_run(name, seed) if on_run else None,
                    precision=precision,
                    teachers=teachers,
                    seed=seed,
                    **slots,
                )
                values[seed] = evaluate(pruned.model)
                first = first or pruned
        except SecateurError as error:
            return Candidate(name, {}, None, None, str(error))
        timed = timings(model, first, (engine,))[engine] if first and first.structure_plan.smaller else None
        return Candidate(name, values, first, timed)

    candidates = [runs_of(name) for name in _names(methods, slots)]
    best_first = sorted(candidates, key=lambda c: (c.pruned is None, -c.value.mean if c.values else 0.0))
    return Comparison(budget, evaluate(model), tuple(best_first), share=metric is None)


def _names(methods: Sequence[str] | None, slots: Mapping[str, Any]) -> list[str]:
    """Return the methods to compare, random pruning among them, after checking that they and the slots exist."""
    if methods is None:
        recipe: Recipe = find_method(BASELINE).but(**slots)
        wanted = recipe.granularity.name
        methods = [n for n, c in registry.cards().items() if wanted in c.granularity and c.paradigm == "after training"]
    for name in methods:
        find_method(name).but(**slots)
    return list(dict.fromkeys([*methods, BASELINE]))
