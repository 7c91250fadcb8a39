"""Fills the generated blocks of the README and the cards from the methods' cards and the records in ``results/``.

A block is what stands between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``.

    python -m docs.generate           # rewrite them
    python -m docs.generate --check   # fail if one is out of date
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.coverage.table import PEERS, VERDICT_HEAD, failure, markdown_table, shares, verdicts

import secateur as sc
from secateur.bench.benchmarks import SANITY, Benchmark, benchmark_names, find_benchmark
from secateur.bench.demo_report import LEGEND, headline_of, table_of, verdict_of
from secateur.bench.site.entries import budget_words
from secateur.bench.statistics import Interval, Paired, interval
from secateur.bench.store import Store
from secateur.bench.summary import CONTROLS, Row, check_claims, check_masks, summarize

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "src/secateur/methods/*.md")


def main() -> None:
    """Rewrite every block, or check that none would change."""
    stale = []
    for path in sorted(file for pattern in FILES for file in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(filled, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"Out of date: {', '.join(stale)}. Run: python -m docs.generate")


def fill(text: str) -> str:
    """Return a document with every block filled anew.

    Raises:
        KeyError: A block of an unknown name.
    """

    def replace(match: re.Match[str]) -> str:
        name, *arguments = match["name"].split()
        return f"{match['begin']}\n{BLOCKS[name](*arguments)}\n{match['end']}"

    pattern = r"(?P<begin><!-- begin: (?P<name>[\w -]+) -->)\n.*?(?P<end><!-- end -->)"
    return re.sub(pattern, replace, text, flags=re.DOTALL)


def methods_table() -> str:
    """Return the table of all methods."""
    rows = [
        (
            f"[`{card.name}`](src/secateur/methods/{card.name}.md)",
            card.summary,
            ", ".join(card.granularity),
            card.data,
            card.paradigm,
        )
        for card in sc.methods()
    ]
    return markdown_table(("method", "what it does", "units", "data", "paradigm"), rows)


def demo_table() -> str:
    """Return the demo's table from its record."""
    record = read("demo/digits.json")
    content = table_of(record)
    table = markdown_table(content.head, content.rows)
    words = f"{verdict_of(record)} {LEGEND} ± is the 95 % interval over 3 seeds. {machine(record)}"
    return f"{headline_of(record)}.\n\n{table}\n\n{words}"


def criteria_table(method: str) -> str:
    """Return the rows of one method from the comparison of criteria on digits, with random beside it."""
    record = read("benchmarks/criteria_on_digits.json")
    rows = []
    for arm in record["arms"]:
        if arm["method"] not in (method, "random"):
            continue
        cells = [f"`{arm['label']}`"]
        for epochs in record["epochs"]:
            runs = interval([100 * a for a in arm["test_accuracy"][str(epochs)]])
            cells.append(f"{runs.mean:.2f} ± {runs.half_width:.2f}")
        rows.append(cells)
    head = ["settings", *(f"after {e:g} epoch{'s' * (e != 1)} (%)" for e in record["epochs"])]
    return f"{markdown_table(head, rows)}\n\n{machine(record)}"


def records_table(method: str) -> str:
    """Return the official figures of one method on every benchmark, with the controls at the same budget beside it."""
    store = Store(ROOT / "results" / "records")
    parts = [_figures(find_benchmark(name), store, method) for name in benchmark_names()]
    unknown = f"No official record yet: whether `{method}` beats random pruning under the same recovery is not known."
    return "\n\n".join(filter(None, parts)) or unknown


def _figures(benchmark: Benchmark, store: Store, method: str) -> str:
    rows = [row for row in summarize(store.read(benchmark.name)[0], benchmark) if row.official and row.value]
    claims = _claims(rows, benchmark, method)
    values = {(row.arm, row.granularity, row.budget): percent(row.value) for row in rows}
    own = [row for row in rows if row.role == "method" and benchmark.arm(row.arm).method == method]
    controls = [control for control in CONTROLS if any(control in row.against for row in own)]
    controlled = {(row.granularity, row.budget) for row in rows if row.arm in CONTROLS}
    compared = [control for control in ("random", "scratch-b") if control in controls]
    lines = [
        (
            f"{row.granularity}, {budget_words(row.budget)}",
            f"`{row.arm}`",
            percent(row.value),
            *(values.get((control, row.granularity, row.budget), "") for control in controls),
            *(_difference(row, control) for control in compared),
        )
        for row in own
    ]
    if not lines:
        return claims
    head = ("units and budget", "arm", f"{benchmark.metric} (%)", *(f"{c} (%)" for c in controls))
    head += tuple(f"minus {c}" for c in compared)
    dense = next((f" The dense network has {percent(row.value)} %." for row in rows if row.role == "dense"), "")
    trained = any(ladder.recovery.epochs for ladder in benchmark.ladders)
    recovery = "after the same recovery for every method" if trained else "right after the cut, nothing trained"
    words = (
        f"**{benchmark.title}** (`secateur bench run {benchmark.name}`): test {benchmark.metric} {recovery}, "
        f"mean and 95 % interval over {len(benchmark.seeds)} seeds.{dense}"
    )
    parts = (
        words,
        markdown_table(head, lines),
        _against_random(own, method, len(benchmark.seeds), controlled),
        _masks(rows, own),
        claims,
    )
    return "\n\n".join(filter(None, parts))


def _claims(rows: list[Row], benchmark: Benchmark, method: str) -> str:
    """Return what papers claim of a method, with our figures and what they say."""
    lines = [
        (
            f"{found.claim.says} ({found.claim.source})",
            budget_words(found.arm.budget),
            f"`{found.arm.arm}` {percent(found.arm.value)}",
            f"`{found.above.arm}` {percent(found.above.value)}",
            f"{100 * found.paired.difference.mean:+.2f} ± {100 * found.paired.difference.half_width:.2f}",
            f"**{found.verdict}**",
        )
        for found in check_claims(rows, benchmark)
        if found.claim.method == method
    ]
    head = ("claim", "budget", "ours (%)", "beside (%)", "difference, paired by seed", "here it")
    return markdown_table(head, lines) if lines else ""


def _masks(rows: list[Row], own: list[Row]) -> str:
    """Return what every mask of a benchmark is worth when it is shuffled, or has new weights; if the method has one."""
    checked = check_masks(rows)
    if not any(found.row in own for found in checked):
        return ""
    lines = [
        (
            f"`{found.row.arm}`, {budget_words(found.row.budget)}",
            percent(found.row.value),
            *(f"{percent(found.checks[c].value)} ({_points(found.paired.get(c))})" for c in SANITY),
        )
        for found in checked
    ]
    head = ("mask", "as it is (%)", "shuffled within layers (%)", "new weights under it (%)")
    words = "**Do masks hold more than how many weights each layer keeps?** " + " ".join(
        _counted(what, [found.paired[check] for found in checked if check in found.paired])
        for check, what in CHECKED.items()
    )
    return f"{words}\n\n{markdown_table(head, lines)}"


CHECKED = {"shuffled": "With its mask shuffled within layers", "fresh": "With new weights under its mask"}


def _counted(what: str, differences: list[Paired]) -> str:
    """Return in words how many methods end lower, higher, or not told apart."""
    if not differences:
        return ""
    found = Counter(difference.verdict for difference in differences)
    words = {"worse": "end{s} lower", "undecided": "{are} not told apart", "better": "end{s} **higher**"}
    parts = [
        f"{n} {words[verdict].format(s='s' * (n == 1), are='is' if n == 1 else 'are')}"
        for verdict in words
        if (n := found[verdict])
    ]
    return f"{what}, of {len(differences)} mask{'s' * (len(differences) != 1)} {', '.join(parts)}."


def _points(difference: Paired | None) -> str:
    if difference is None:
        return "trained for another time"
    return f"{100 * difference.difference.mean:+.2f}, {difference.verdict}"


RIVALS = {
    "random": "random pruning",
    "scratch-e": "new weights under a mask of equal density in each layer, trained as long (`scratch-e`)",
}


def _against_random(rows: list[Row], method: str, seeds: int, controlled: set[tuple[str, str]]) -> str:
    """Return in words at which budgets a method beats random units that were trained as long as its own.

    Args:
        rows: The method's.
        method: Its name.
        seeds: How many the benchmark has.
        controlled: Units and budgets at which a control has an official record.
    """
    words = {
        "better": "Better than {}",
        "undecided": f"No difference from {{}} that {seeds} seeds can show",
        "worse": "**Worse than {}**",
        "longer": "Trained longer than every control, so that a difference would say nothing,",
        "alone": "No control has an official record",
    }
    found: dict[str, list[str]] = {}
    for row in rows:
        rival = next((control for control in RIVALS if control in row.against), None)
        if rival:
            said = words[row.against[rival].verdict].format(RIVALS[rival])
        else:
            said = words["longer" if (row.granularity, row.budget) in controlled else "alone"]
        arm = f" (`{row.arm}`)" if row.arm != method else ""
        found.setdefault(said, []).append(f"{row.granularity}, {budget_words(row.budget)}{arm}")
    return " ".join(f"{said} at {'; '.join(where)}." for said, where in found.items())


def _difference(row: Row, control: str) -> str:
    found = row.against.get(control)
    return "" if found is None else f"{100 * found.difference.mean:+.2f} ({found.verdict})"


def percent(found: Interval | None) -> str:
    """Return an interval of shares as percent."""
    return "" if found is None else f"{100 * found.mean:.2f} ± {100 * found.half_width:.2f}"


def cost_words(method: str) -> str:
    """Return what a method costs beside plain training, and its scores on ResNet-50, measured."""
    record = read("benchmarks/method_costs.json")
    cost = record["methods"][method]
    epochs = f"{cost['passes']:g} epoch{'' if cost['passes'] == 1 else 's'}"
    small = (
        f"Measured on {record['network']} (`python -m benchmarks.method_costs`): scoring sends the samples of {epochs} "
        f"through the network and takes {cost['score_per_epoch']:.2f} times the time and {cost['score_memory']:.2f} "
        "times the memory of an epoch of plain training; an epoch of recovery, with all that the method does in it, "
        f"takes {cost['training_time']:.2f} times the time and {cost['training_memory']:.2f} times the memory."
    )
    return "\n\n".join(filter(None, (small, _large_cost_words(method))))


def _large_cost_words(method: str) -> str:
    """Return what the scores of a method cost on ResNet-50; nothing for those that are learned in training."""
    record = read("benchmarks/resnet50_scoring.json")
    parts = []
    for arm, row in record["arms"].items():
        if row["method"] != method:
            continue
        bare = row["time_over_needed"]
        beside = "" if bare is None else f" ({bare:.2f} times that of the bare passes that the formula needs)"
        parts.append(
            f"`{arm}`, by {row['granularity']}: {row['time']:.2f} times the time of one forward and backward pass of "
            f"the same samples{beside}, {row['memory']:.2f} times the memory of a training step"
        )
    where = f"Scores, once, of {record['network']} (`python -m benchmarks.resnet50_scoring`)"
    return f"{where}: {'; '.join(parts)}." if parts else ""


def oracle_table() -> str:
    """Return the rank correlations of Taylor scores with the true change of the loss."""
    record = read("benchmarks/taylor_oracle.json")
    splits = list(record["spearman"])
    axes = list(record["spearman"][splits[0]])
    rows = [(f"`{axis}`", *(f"{record['spearman'][split][axis]:.2f}" for split in splits)) for axis in axes]
    return f"{markdown_table(('axis', *splits), rows)}\n\n{machine(record)}"


def skipping_table() -> str:
    """Return the time of one image in networks that compute a part of their channels, relative to dense ones."""
    record = read("benchmarks/skipping.json")
    rows = []
    for network, case in record["cases"].items():
        for density, relative in case["relative"].items():
            faster = relative * case["dense_ms"] / case["onnxruntime_ms"]
            rows.append((network, density, f"{case['macs'][density]:.2f}", f"{relative:.2f}", f"{faster:.2f}"))
    head = ("network", "density", "MACs of this image", "time / dense", "time / dense in ONNX Runtime")
    return f"{markdown_table(head, rows)}\n\n{machine(record)}"


def fbs_table() -> str:
    """Return the accuracy of channels chosen per input beside channels that are removed, at the same MACs."""
    record = read("benchmarks/fbs_on_digits.json")
    rows = [
        (
            arm["label"],
            percent(interval(arm["test_accuracy"])),
            f"{max(arm['macs_at_most']):.3f}",
            f"{interval(arm['macs_on_average']).mean:.3f}",
        )
        for arm in record["arms"]
    ]
    table = markdown_table(("method", "test accuracy (%)", "MACs at most", "MACs on average"), rows)
    return f"{table}\n\nThe dense network has {100 * record['dense']:.2f} %. {machine(record)}"


def empty_filters_table() -> str:
    """Return how many filters are left without weights by masks that move in training, beside one that stays."""
    record = read("benchmarks/empty_filters.json")
    rows = [
        (arm["label"], percent(interval(arm["empty"])), percent(interval(arm["validation_accuracy"])))
        for arm in record["arms"]
    ]
    table = markdown_table(("mask", "filters without weights (%)", "validation accuracy (%)"), rows)
    return f"{table}\n\n{machine(record)}"


def coverage_table() -> str:
    """Return how many networks of each library pass each stage, beside Torch-Pruning, and which fail and why."""
    record = read("coverage/rows.json")
    rows, passed = record["rows"], shares(record["rows"], record["listed"])
    failed = [f"- `{row['name']}`: {failure(row)[:160]}" for row in rows if row["failed"]]
    parts = [
        markdown_table(
            ("library", *next(iter(passed.values()))), [(library, *cells.values()) for library, cells in passed.items()]
        ),
        markdown_table(VERDICT_HEAD, verdicts(rows, PEERS)),
        f"{len(failed)} failures:" if failed else "No failures.",
        "\n".join(failed),
    ]
    return "\n\n".join(parts).strip()


README_BENCHMARKS = (
    "beside_torch_pruning",
    "masked_training",
    "analysis_time",
    "large_model",
    "scoring_cost",
    "resnet50_scoring",
    "leaderboard_size",
)


def benchmark_lines() -> str:
    """Return one line per benchmark of speed."""
    lines = []
    for name in README_BENCHMARKS:
        record = read(f"benchmarks/{name}.json")
        lines.append(f"- {record['claim']}: **{record['result']}** (`python -m benchmarks.{name}`)")
    return "\n".join(lines)


def read(path: str) -> Any:
    """Return a record of the folder ``results``."""
    return json.loads((ROOT / "results" / path).read_text(encoding="utf-8"))


def machine(record: Any) -> str:
    """Return where a record was made, in one line."""
    facts = record["environment"]
    return f"Measured on {facts['processor']} ({facts['cores']} cores), torch {facts['torch']}."


BLOCKS: dict[str, Callable[..., str]] = {
    "methods": methods_table,
    "demo": demo_table,
    "criteria": criteria_table,
    "oracle": oracle_table,
    "records": records_table,
    "cost": cost_words,
    "benchmarks": benchmark_lines,
    "coverage": coverage_table,
    "skipping": skipping_table,
    "fbs": fbs_table,
    "empty-filters": empty_filters_table,
}

if __name__ == "__main__":
    main()
