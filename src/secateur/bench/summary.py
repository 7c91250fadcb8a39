"""What the records of a benchmark say: one row per arm and budget, with its rivals at the same budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.bench.benchmarks import SANITY, Benchmark, Claim, budget_label
from secateur.bench.records import Record
from secateur.bench.statistics import Interval, Paired, hypervolume, interval, paired, ranks
from secateur.bench.store import standing

CONTROLS = ("random", "scratch-e", "scratch-b")

ROUNDING = 0.99
"""Trainings of the same length may differ by a step or two."""


@dataclass(frozen=True)
class Row:
    """The runs of one arm at one budget, which differ in their seeds.

    Attributes:
        arm: Method or control, or ``dense``.
        role: Which of these.
        granularity: Of the units.
        budget: What was asked, for example ``macs=0.5``.
        records: Those that have a result, by seed.
        failures: Those that have none.
        value: The benchmark's metric; None if no run has a result.
        against: Paired differences from the controls at the same budget, by control. A control that was trained less
            than the arm is no rival: what is better then may be the training.
        rank: Among the methods and controls at the same budget; arms whose intervals overlap tie.
        official: Whether every record with a result is official.
        reasons: Why not.
    """

    arm: str
    role: str
    granularity: str
    budget: str
    records: tuple[Record, ...]
    failures: tuple[Record, ...]
    value: Interval | None
    against: dict[str, Paired]
    rank: int | None
    official: bool
    reasons: tuple[str, ...]

    def mean(self, quantity: str) -> float:
        """Return the mean over seeds of a number: ``macs``, ``params``, ``bytes`` ..., of the pruned network."""
        sizes = [record.measured.after.model_dump()[quantity] for record in self.records if record.measured]
        return interval(sizes).mean

    @property
    def effective_sparsity(self) -> float | None:
        """The mean share of the parameters without effect; None for networks that are smaller, where it is unknown."""
        if self.role == "dense":
            return None
        known = [m.effective_sparsity for m in (r.measured for r in self.records) if m is not None and not m.smaller]
        shares = [share for share in known if share is not None]
        return interval(shares).mean if shares else None

    def speedup(self, engine: str) -> Interval | None:
        """Return how many times faster than the dense network the pruned one is; None if it was not timed."""
        timings = [record.machine.latency[engine] for record in self.records if engine in record.machine.latency]
        return interval([t.dense.p50_ms / t.pruned.p50_ms for t in timings]) if timings else None


def summarize(records: Iterable[Record], benchmark: Benchmark, controls: Sequence[str] = CONTROLS) -> list[Row]:
    """Return one row per arm and budget, in the order of the benchmark's ladders, dense first, best mean first.

    Args:
        records: Of the benchmark.
        benchmark: Which one.
        controls: What rows are compared with.
    """
    records = list(records)
    reasons = standing(records, benchmark)
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.run.seed):
        groups[record.run.group].append(record)
    settings: dict[tuple[str, str], list[str]] = defaultdict(list)
    for arm, granularity, budget in groups:
        settings[granularity, budget].append(arm)
    order = _order(benchmark)
    rows = []
    for setting in sorted(settings, key=lambda s: order.get(s, len(order))):
        here = {arm: groups[arm, *setting] for arm in settings[setting]}
        rows += sorted(_rows(here, reasons, controls), key=lambda row: -row.value.mean if row.value else 0.0)
    return rows


VERDICTS = {"better": "holds", "worse": "does not hold", "undecided": "undecided"}


@dataclass(frozen=True)
class Checked:
    """A claim of a paper at one budget.

    Attributes:
        claim: What is claimed.
        arm: The row of the arm that is said to be above.
        above: The row of the other one.
        paired: Their difference, seed by seed.
    """

    claim: Claim
    arm: Row
    above: Row
    paired: Paired

    @property
    def verdict(self) -> str:
        """Whether the claim ``holds``, ``does not hold``, or is ``undecided`` by these seeds."""
        return VERDICTS[self.paired.verdict]


def check_claims(rows: Iterable[Row], benchmark: Benchmark) -> list[Checked]:
    """Return the claims of a benchmark at every budget at which both arms have results with a seed in common."""
    by_setting = {(row.granularity, row.budget, row.arm): row for row in rows}
    checked = []
    for claim in benchmark.claims:
        wanted = None if claim.budgets is None else {budget_label(budget) for budget in claim.budgets}
        for (granularity, budget, arm), row in by_setting.items():
            other = by_setting.get((granularity, budget, claim.above))
            if arm != claim.arm or other is None or (wanted is not None and budget not in wanted):
                continue
            if (difference := paired(_by_seed(row.records), _by_seed(other.records))) is not None:
                checked.append(Checked(claim, row, other, difference))
    return checked


@dataclass(frozen=True)
class MaskChecked:
    """A method's mask at one budget, and what its sanity checks say of it.

    Attributes:
        row: The method as it is.
        checks: The same with its mask shuffled, or with new weights under it, by the check (`SANITY`).
        paired: How much higher these are, seed by seed; only for checks that were trained as long as the method.
    """

    row: Row
    checks: dict[str, Row]
    paired: dict[str, Paired]


def check_masks(rows: Iterable[Row]) -> list[MaskChecked]:
    """Return the methods that have results of both sanity checks, at every budget, in the order of the rows."""
    by_setting = {(row.granularity, row.budget, row.arm): row for row in rows}
    checked = []
    for (granularity, budget, arm), row in by_setting.items():
        names = {check: (granularity, budget, f"{arm}+{check}") for check in SANITY}
        checks = {check: by_setting[name] for check, name in names.items() if name in by_setting}
        fair = {check: other for check, other in checks.items() if _trained_alike(row, other)}
        found = {check: paired(_by_seed(other.records), _by_seed(row.records)) for check, other in fair.items()}
        differences = {check: difference for check, difference in found.items() if difference is not None}
        if len(checks) == len(SANITY):
            checked.append(MaskChecked(row, checks, differences))
    return checked


def _trained_alike(row: Row, other: Row) -> bool:
    shorter, longer = sorted((_steps(row.records), _steps(other.records)))
    return shorter >= ROUNDING * longer


def fronts(rows: Iterable[Row], quantity: str = "macs") -> dict[tuple[str, str], float]:
    """Return the hypervolume of each arm's mean points, by (arm, granularity); only to be compared within a benchmark.

    The cost is the kept share of `quantity` in the dense network, the reference point (1, 0); the unstructured units
    count with their effective cost.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row.value is None or row.role == "dense":
            continue
        kind = {"macs": "effective_macs", "params": "nonzero_params"}.get(quantity, quantity)
        before = [r.measured.before.model_dump()[kind] for r in row.records if r.measured]
        points[row.arm, row.granularity].append((row.mean(kind) / interval(before).mean, row.value.mean))
    return {key: hypervolume(found, (1.0, 0.0)) for key, found in points.items()}


def _order(benchmark: Benchmark) -> dict[tuple[str, str], int]:
    settings = [("dense", "")]
    for ladder in benchmark.ladders:
        settings += [(ladder.granularity.name, f"{b.kind}={b.value:g}") for b in ladder.budgets]
    return {setting: index for index, setting in enumerate(settings)}


def _by_seed(records: Iterable[Record]) -> dict[int, float]:
    return {record.run.seed: record.value for record in records if record.measured}


def _steps(records: Iterable[Record]) -> float:
    steps = [record.measured.training.steps for record in records if record.measured]
    return sum(steps) / max(len(steps), 1)


def _rows(groups: dict[str, list[Record]], reasons: dict[str, tuple[str, ...]], controls: Sequence[str]) -> list[Row]:
    """Return the rows of all arms at one budget."""
    values = {arm: _by_seed(group) for arm, group in groups.items()}
    intervals = {arm: interval(list(found.values())) for arm, found in values.items() if found}
    ranked = ranks(intervals)
    steps = {arm: _steps(group) for arm, group in groups.items()}
    rows = []
    for arm, group in groups.items():
        against = {
            control: difference
            for control in controls
            if control != arm
            and steps.get(control, 0) >= ROUNDING * steps[arm]
            and (difference := paired(values[arm], values.get(control, {}))) is not None
        }
        why = tuple(dict.fromkeys(reason for record in group for reason in reasons[record.id]))
        rows.append(
            Row(
                arm=arm,
                role=group[0].run.role,
                granularity=group[0].run.granularity,
                budget=group[0].run.budget_label,
                records=tuple(record for record in group if record.measured),
                failures=tuple(record for record in group if not record.measured),
                value=intervals.get(arm),
                against=against,
                rank=ranked.get(arm),
                official=not why,
                reasons=why,
            )
        )
    return rows
