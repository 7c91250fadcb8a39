"""What the pages say about rows and records, as plain data: numbers in the units that people read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from secateur.bench.benchmarks import Benchmark, Variant
from secateur.bench.records import Record, Reported, Run
from secateur.bench.statistics import Interval, Paired
from secateur.bench.summary import Row
from secateur.core.registry import Card
from secateur.parts.recovery.fine_tune import FineTune

PER_SHARD = 200
"""Records in one data file: a record page loads the one file that holds it."""

CONTROL_WORDS = {
    "dense": "the unpruned network",
    "random": "units removed at random, same recovery",
    "bottleneck-e": "the network with narrower blocks from new weights, as many epochs as the dense one",
    "scratch-e": "the small network from new weights, as many epochs as the dense one",
    "scratch-b": "the small network from new weights, as much computation as the dense one",
}


def slug(benchmark: str) -> str:
    """Return a benchmark's name as it stands in file names."""
    return benchmark.replace("/", "-")


def places(benchmark: str, records: Sequence[Record]) -> dict[str, str]:
    """Return the address of each record's page by record id, from the site's root."""
    return {r.id: f"record.html#{slug(benchmark)}-{i // PER_SHARD}/{r.id}" for i, r in enumerate(records)}


def shards(benchmark: str, records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each data file by its name."""
    return {
        f"{slug(benchmark)}-{i // PER_SHARD}": list(records[i : i + PER_SHARD])
        for i in range(0, len(records), PER_SHARD)
    }


def command(run: Run, every_seed: bool = False) -> str:
    """Return the command that makes a record, or the records of all seeds."""
    words = ["secateur bench run", run.benchmark]
    if run.role != "dense":
        words += ["--methods", run.arm, "--budgets", run.budget_label]
    return " ".join(words if every_seed else [*words, "--seeds", str(run.seed)])


def entry(row: Row, benchmark: Benchmark, cards: Mapping[str, Card], address: Mapping[str, str]) -> dict[str, Any]:
    """Return one line of a benchmark's table and one point of its plot; percentages, milliseconds, multiples."""
    some = (*row.records, *row.failures)[0]
    card = cards.get(some.run.method if row.role == "method" and some.run.method else row.arm)
    return {
        "arm": row.arm,
        "role": row.role,
        "words": CONTROL_WORDS.get(row.arm, card.summary if card else "") + _otherwise(benchmark.variants.get(row.arm)),
        "paradigm": "control" if row.role != "method" or card is None else card.paradigm,
        "page": card.name if card else "",
        "units": row.granularity,
        "data": card.data if card is not None else "none",
        "recovery": recovery_words(some.run),
        "budget": row.budget,
        "value": _percent(row.value),
        "x": _costs(row, benchmark.engines),
        "effective": None if row.effective_sparsity is None else round(100 * row.effective_sparsity, 3),
        "speedup": {e: _pair(found) for e in benchmark.engines if (found := row.speedup(e)) is not None},
        "against": {name: _difference(paired) for name, paired in row.against.items()},
        "rank": row.rank,
        "official": row.official,
        "reasons": list(row.reasons),
        "reported": [_reported(r) for r in benchmark.reported if r.is_about(some.run)],
        "records": [[r.run.seed, round(100 * r.value, 3), address[r.id]] for r in row.records],
        "failures": [[r.run.seed, r.error.message if r.error else "", address[r.id]] for r in row.failures],
        "command": command(some.run, every_seed=True),
    }


def _otherwise(variant: Variant | None) -> str:
    """Return in which slots a variant differs from its method, as a recipe is written."""
    if variant is None:
        return ""
    return f" Here with {', '.join(f'{slot}: {json.dumps(answer)}' for slot, answer in variant.slots.items())}."


def recovery_words(run: Run) -> str:
    """Return what a network was trained for after the cut, in a few words."""
    if run.recipe is None:
        return f"trained {FineTune.parse(run.training).epochs:g} epochs"  # defaults are left out
    recovery = run.recipe["recovery"]
    epochs = recovery.get("epochs", 0)
    if not epochs:
        return "none"
    compute = " of the dense network's computation" if recovery.get("compute") == "dense epochs" else ""
    return f"{recovery['name']} {epochs:g} epochs{compute}"


def budget_words(label: str) -> str:
    """Return a budget in words: ``macs=0.5`` is 50 % of the MACs."""
    kind, _, value = label.partition("=")
    if kind == "sparsity":
        return f"{100 * float(value):g} % sparsity"
    if kind in ("macs", "params", "bytes"):
        return f"{100 * float(value):g} % of the {'MACs' if kind == 'macs' else kind}"
    return label


def _costs(row: Row, engines: Iterable[str]) -> dict[str, float]:
    """Return what the networks cost, in percent of the dense network, on the axes of the plot."""
    measured = [record.measured for record in row.records if record.measured]
    if not measured:
        return {}
    costs = {
        "sparsity": fmean(100 * m.sparsity for m in measured),
        "macs": fmean(100 * m.after.effective_macs / m.before.effective_macs for m in measured),
        "params": fmean(100 * m.after.nonzero_params / m.before.nonzero_params for m in measured),
        "bytes": fmean(100 * m.after.bytes / m.before.bytes for m in measured),
    }
    for engine in engines:
        found = row.speedup(engine)
        if found is not None:
            costs[f"latency {engine}"] = 100 / found.mean
        elif row.role == "dense":
            costs[f"latency {engine}"] = 100.0
    return {key: round(value, 3) for key, value in costs.items()}


def _percent(found: Interval | None) -> list[float] | None:
    return None if found is None else [round(100 * found.mean, 3), round(100 * found.half_width, 3), found.n]


def _pair(found: Interval) -> list[float]:
    return [round(found.mean, 3), round(found.half_width, 3)]


def _difference(found: Paired) -> list[Any]:
    """Return mean, half-width, verdict, both ends of the bootstrap interval, and the number of pairs."""
    mean, half, low, high = (
        round(100 * share, 3) for share in (found.difference.mean, found.difference.half_width, found.low, found.high)
    )
    return [mean, half, found.verdict, low, high, found.difference.n]


def _reported(found: Reported) -> dict[str, Any]:
    return {"value": round(100 * found.value, 2), "source": found.source, "note": found.note}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Return one sentence per budget: who leads, and how many methods are decided better or worse than random.

    Unofficial results, of one seed for example, count only where there are no others, and the sentence says so.
    """
    settings = dict.fromkeys((row.granularity, row.budget) for row in rows if row.role != "dense")
    return [_verdict([r for r in rows if (r.granularity, r.budget) == s], *s) for s in settings]


def _verdict(rows: Sequence[Row], granularity: str, budget: str) -> str:
    where = f"{budget_words(budget)}, by {granularity}: "
    results = [row for row in rows if row.value is not None]
    valued = [row for row in results if row.official] or results
    methods = [row for row in valued if row.role == "method"]
    if not valued:
        return where + "no run has a result."
    best = max(valued, key=lambda row: row.value.mean if row.value else 0.0)
    assert best.value is not None
    kind = "" if best.official else " (unofficial)"
    text = f"{where}the highest mean{kind} is that of {best.arm}, {100 * best.value.mean:.2f} %"
    tied = [row.arm for row in valued if row.rank == best.rank and row is not best]
    text += f"; its interval overlaps with {_names(tied)}. " if tied else ". "
    compared = [row for row in methods if "random" in row.against]
    if compared:
        groups = {v: [r.arm for r in compared if r.against["random"].verdict == v] for v in ("better", "worse")}
        undecided = len(compared) - sum(map(len, groups.values()))
        text += (
            f"Against random pruning, seed by seed: better: {_names(groups['better'])}; "
            f"worse: {_names(groups['worse'])}; undecided: {undecided}."
        )
    return text


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return shown or "none"
