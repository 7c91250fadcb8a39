"""The demo's record as a page and as rows of a table."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from secateur.bench.statistics import interval
from secateur.measure.figures import Point, tradeoff_figure, training_figure, widths_figure
from secateur.measure.report import (
    FROZEN_TEXT,
    MINUS,
    Page,
    Section,
    Table,
    Tile,
    change,
    count,
    frozen_table,
    machine_line,
)

LABELS = {"dense": "dense", "taylor": "Taylor", "random": "random", "scratch": "scratch"}
LEGEND = (
    "Taylor: channels chosen by Taylor importance. random: channels chosen at random, same recovery. "
    "scratch: the architecture that Taylor found, new weights, as many epochs as the dense network had."
)


def table_of(record: dict[str, Any]) -> Table:
    """Return the demo's one table; every figure in it was measured in the run."""
    rows = record["rows"]
    engines = list(rows["dense"]["latency"])
    head = ["network", "test accuracy", "params", "MACs", "file", *engines]
    return Table(head, [[LABELS[name], *_cells(row, engines)] for name, row in rows.items()], strong=1)


def _cells(row: dict[str, Any], engines: list[str]) -> list[str]:
    accuracy = row["test_accuracy"]
    spread = f" ± {100 * accuracy['half_width']:.2f}" if accuracy["n"] > 1 else ""
    return [
        f"{100 * accuracy['mean']:.2f}{spread} %",
        count(row["profile"]["params"]),
        count(row["profile"]["macs"]),
        f"{row['file_bytes'] / 1000:,.0f} kB",
        *(f"{row['latency'][engine]['p50_ms']:.2f} ms" for engine in engines),
    ]


def headline_of(record: dict[str, Any]) -> str:
    """Return the result in one sentence."""
    dense, small = record["rows"]["dense"], record["rows"]["taylor"]
    difference = 100 * (small["test_accuracy"]["mean"] - dense["test_accuracy"]["mean"])
    macs = small["profile"]["macs"] / dense["profile"]["macs"]
    speedups = [
        f"{dense['latency'][engine]['p50_ms'] / small['latency'][engine]['p50_ms']:.1f}x faster in {engine}"
        for engine in dense["latency"]
    ]
    return f"{100 * macs:.0f} % of the MACs, {difference:+.2f} points of accuracy, {', '.join(speedups)}".replace(
        "-", MINUS
    )


def verdict_of(record: dict[str, Any]) -> str:
    """Return what the two controls say, in plain words: random pruning, and training from scratch."""
    scratch = record["scratch"]["epochs"]
    recovery = record["recipes"]["taylor"]["recovery"]["epochs"]
    return (
        f"Taylor pruning is {_beside(record, 'random', 'random pruning')}, and "
        f"{_beside(record, 'scratch', 'its own architecture trained from scratch')}, which took {scratch:g} epochs "
        f"instead of {recovery:g}."
    ).replace("-", MINUS)


def _beside(record: dict[str, Any], other: str, words: str) -> str:
    """Return "0.17 points above random pruning (less than the interval)" and the like."""
    ours, theirs = (record["rows"][name]["test_accuracy"] for name in ("taylor", other))
    points = round(100 * (ours["mean"] - theirs["mean"]), 2)
    unsure = abs(points) < 100 * max(ours["half_width"], theirs["half_width"])
    direction = "above" if points > 0 else "below" if points < 0 else "from"
    return f"{abs(points):.2f} points {direction} {words}{' (less than the interval)' if unsure else ''}"


def demo_page(record: dict[str, Any]) -> Page:
    """Return the demo's page."""
    dense, small = record["rows"]["dense"], record["rows"]["taylor"]
    seeds = small["test_accuracy"]["n"]
    runs = [run for run in record["runs"] if run["arm"] == "taylor" and run["budget_macs"] == record["budget"]["macs"]]
    widths = runs[0]["widths"]
    timed = next(iter(dense["latency"].values()))
    return Page(
        title="secateur demo",
        headline=headline_of(record),
        subtitle=(
            f"{record['task']['network']} on {record['task']['name']}, pruned by channels to at most "
            f"{100 * record['budget']['macs']:.0f} % of its MACs."
        ),
        tiles=[
            Tile(
                f"{100 * small['test_accuracy']['mean']:.2f} %",
                f"test accuracy (dense: {100 * dense['test_accuracy']['mean']:.2f} %)",
            ),
            Tile(change(dense["profile"]["macs"], small["profile"]["macs"]), "multiply-adds"),
            Tile(change(dense["profile"]["params"], small["profile"]["params"]), "parameters"),
            Tile(change(dense["file_bytes"], small["file_bytes"]), "file size"),
            Tile(f"{runs[0]['proof']:.0e}", "largest relative difference between cut and masked network"),
        ],
        sections=[
            Section(
                "Result",
                text=verdict_of(record),
                table=table_of(record),
                caption=(
                    f"Accuracy: mean and 95 % interval over {seeds} seeds (Student's t), on images that nothing was "
                    f"chosen by. Latency: median of one call with a batch of {timed['batch']}, {timed['threads']} "
                    f"threads, float32, all networks timed in turn. {LEGEND}"
                ),
            ),
            Section(
                "Accuracy against cost",
                figure=tradeoff_figure(
                    _series(record),
                    "multiply-adds (millions)",
                    "test accuracy (%)",
                    Point(dense["profile"]["macs"] / 1e6, 100 * dense["test_accuracy"]["mean"]),
                ),
                caption=f"Bars: 95 % intervals over {seeds} seeds; points without a bar are single runs.",
            ),
            Section(
                "Kept width per layer",
                figure=widths_figure({n: w[0] for n, w in widths.items()}, {n: w[1] for n, w in widths.items()}),
                caption="Units of each free axis before and after (first seed).",
            ),
            Section(
                "Recovery",
                figure=training_figure({f"seed {run['seed']}": run["history"] for run in runs}),
                caption="Fine-tuning after the cut.",
            ),
            Section(
                "What was frozen, and why",
                text=FROZEN_TEXT,
                table=frozen_table(runs[0]["frozen"]),
            ),
        ],
        footer=machine_line(record["environment"]),
    )


def write_demo_page(record: dict[str, Any], path: Path) -> None:
    """Write the demo's page."""
    demo_page(record).write(path)


def _series(record: dict[str, Any]) -> dict[str, list[Point]]:
    found: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in record["runs"]:
        found[run["arm"]][run["budget_macs"]].append(run)
    series = {}
    for arm, by_budget in found.items():
        points = []
        for budget, runs in by_budget.items():
            accuracy = interval([100 * run["test_accuracy"] for run in runs])
            macs = interval([run["profile"]["macs"] / 1e6 for run in runs])
            note = f"budget {100 * budget:.0f} %, {accuracy.n} seed{'s' if accuracy.n > 1 else ''}"
            points.append(Point(macs.mean, accuracy.mean, accuracy.half_width, note))
        series[LABELS[arm]] = points
    return series
