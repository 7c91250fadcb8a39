"""``secateur bench``: runs benchmarks, and shows what their records say."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from secateur.bench import RESULTS
from secateur.cli.common import JsonOption, ResultsOption, check_folder, console, messages, print_json
from secateur.errors import InvalidFile, InvalidRecipe, UnknownName

if TYPE_CHECKING:
    from secateur.bench.benchmarks import Benchmark
    from secateur.bench.runner import Estimate, Progress
    from secateur.bench.summary import Row

app = typer.Typer(help="Run benchmarks and show what their records say.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(help="For example digits/resnet8, or the path of a YAML file.")]
SCRATCH = Path("runs") / "bench"
AGAINST = "random,scratch-e"


@app.command("list")
def list_benchmarks(as_json: JsonOption = False) -> None:
    """List all benchmarks."""
    from secateur.bench.benchmarks import benchmark_names, find_benchmark

    found = [find_benchmark(name) for name in benchmark_names()]
    if as_json:
        print_json([{"name": b.name, "version": b.version, "title": b.title} for b in found])
        return
    table = Table("benchmark", "version", "what", "budgets", "seeds", box=None, pad_edge=False)
    for b in found:
        budgets = ", ".join(f"{x.kind}={x.value:g}" for ladder in b.ladders for x in ladder.budgets)
        table.add_row(f"[bold]{b.name}[/]", str(b.version), b.title, budgets, str(len(b.seeds)))
    console.print(table)


@app.command("run")
def run(
    name: NameArgument,
    methods: Annotated[str | None, typer.Option(help="Methods and controls, with commas; default: all.")] = None,
    budgets: Annotated[str | None, typer.Option(help="For example macs=0.5,sparsity=0.9; default: all.")] = None,
    seeds: Annotated[str | None, typer.Option(help="For example 0,1; default: the benchmark's.")] = None,
    executor: Annotated[str, typer.Option(help="local, ray or slurm.")] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Jobs side by side, of one thread each.")] = 2,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; default: one on this machine.")] = None,
    results: ResultsOption = RESULTS,
    scratch: Annotated[Path, typer.Option(help="Folder of dense networks and checkpoints.")] = SCRATCH,
    again: Annotated[
        Literal["none", "failed", "unofficial"], typer.Option(help="Which records to make anew.")
    ] = "none",
    keep_networks: Annotated[bool, typer.Option("--keep-networks", help="Keep pruned networks in scratch.")] = False,
    build: Annotated[Path | None, typer.Option(help="Folder in which to build the leaderboard afterwards.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and how long it takes.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run what is missing of a benchmark. May be stopped at any point, and run again."""
    from secateur.bench import runner
    from secateur.bench.benchmarks import find_benchmark, parse_budget
    from secateur.bench.executors import make_executor
    from secateur.bench.jobs import Workplace
    from secateur.bench.plan import data_of, plan
    from secateur.bench.site.build import build_site
    from secateur.bench.store import Store

    benchmark = find_benchmark(name)
    budget_list = None if budgets is None else [parse_budget(text) for text in budgets.split(",")]
    seed_list = None if seeds is None else [_seed(text) for text in seeds.split(",")]
    runs = plan(benchmark, data_of(benchmark), methods.split(",") if methods else None, budget_list, seed_list)
    store = Store(results)
    place = Workplace(
        results=results.absolute(),
        scratch=scratch.absolute(),
        engines=benchmark.engines,
        reported=benchmark.reported,
        keep_networks=keep_networks,
    )
    if build is not None:
        check_folder(build)
    progress = runner.survey(runs, store)
    if dry_run:
        progress.done |= {record.id: record for record in store.made_for_others(progress.missing, benchmark)}
        _show_plan(progress, runner.estimate(progress, store.read(benchmark.name)[0], jobs), jobs, as_json)
        return
    with runner.only_runner(scratch):
        runner.sweep(results / benchmark.name, scratch / "networks")
        runner.forget(progress, store, place, benchmark, again)
        runner.take_over(progress, store, benchmark)
        if progress.left:
            pool = make_executor(executor, place, min(jobs, progress.left), address)
            try:
                with _live(progress) as on_change:
                    runner.run_benchmark(progress, store, pool, on_change)
            finally:
                pool.close()
    _show_end(progress, as_json)
    if not as_json:
        _show_rows(name, results)
    if build is not None:
        build_site(store, build)
        messages.print(f"Wrote {build / 'index.html'}", highlight=False, markup=False)
    if progress.left:
        raise typer.Exit(1)


@app.command("show")
def show(
    name: NameArgument,
    results: ResultsOption = RESULTS,
    against: Annotated[
        str, typer.Option(help="Controls to compare with, with commas; scratch: all whose names begin so.")
    ] = AGAINST,
) -> None:
    """Show what the records of a benchmark say."""
    _show_rows(name, results, against)


# --------------------------------------------------------------------------------------------------------- words


def _seed(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise InvalidRecipe(f"{text!r} is not a seed; write for example --seeds 0,1,2.") from error


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _show_plan(progress: Progress, estimate: Estimate, jobs: int, as_json: bool) -> None:
    missing = progress.missing
    if as_json:
        print_json(
            {
                "missing": [{"id": run.id, "run": run.label} for run in missing],
                "done": len(progress.done),
                "seconds": estimate.seconds if estimate.known else None,
            }
        )
        return
    if not missing:
        console.print(f"Nothing to do: all {len(progress.done)} runs are done.", highlight=False)
        return
    for run in missing:
        console.print(run.label, highlight=False)
    known = f"{estimate.known} of them timed before"
    time = (
        f"about {_duration(estimate.seconds)} with {jobs} side by side ({known})" if estimate.known else "time unknown"
    )
    console.print(f"{len(missing)} runs to do, {len(progress.done)} done already; {time}.", highlight=False)


def _show_end(progress: Progress, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "done": sorted(progress.done),
                "failed": [record.id for record in progress.failed],
                "left": progress.left,
                "problems": progress.problems,
            }
        )
    for problem in progress.problems:
        messages.print(f"[bold red]problem:[/] {Text(problem).plain}", highlight=False)
    for record in progress.failed:
        if record.error:
            messages.print(f"failed: {record.run.label}: {record.error.message}", highlight=False, markup=False)
    if progress.left:
        messages.print(f"{progress.left} runs are left. Run the same command again to go on.")


def _show_rows(name: str, results: Path, against: str = AGAINST) -> None:
    from secateur.bench.benchmarks import find_benchmark
    from secateur.bench.store import Store
    from secateur.bench.summary import summarize

    benchmark = find_benchmark(name)
    controls = _controls(benchmark, against)
    records, refused = Store(results).read(benchmark.name)
    for file in refused:
        messages.print(f"refused: {file.reason}", highlight=False, markup=False)
    if not records:
        raise InvalidFile(f"There are no records of {name} below {results}. Make them: secateur bench run {name}")
    rows = summarize(records, benchmark, controls)
    masked = any(row.effective_sparsity is not None for row in rows)
    for (units, budget), group in groupby(rows, key=lambda row: (row.granularity, row.budget)):
        title = f"{units}, {budget}" if budget else benchmark.title
        console.print(title, style="bold", highlight=False, markup=False)
        console.print(_table([_cells(row, benchmark, controls) for row in group]))
    for row in rows:
        if not row.official:
            label = " ".join(filter(None, (row.arm, row.granularity, row.budget)))
            console.print(f"not official: {label}: {row.reasons[0]}", highlight=False, markup=False)
    controls_words = f"{', '.join(controls)}: points above these at the same budget, paired by seed. "
    effective = "effective: parameters that masks set to zero or cut off from the output (effective sparsity)."
    console.print(f"± 95 % over seeds (Student's t). {controls_words}{effective if masked else ''}", style="dim")


def _controls(benchmark: Benchmark, against: str) -> list[str]:
    """Return the controls that are named with commas, each once; ``scratch`` are all whose names begin so."""
    found: dict[str, None] = {}
    for name in against.split(","):
        meant = [control for control in benchmark.controls if name == "scratch" and control.startswith(name)]
        if not meant and name not in (*benchmark.controls, *AGAINST.split(",")):
            raise UnknownName(f"control of benchmark {benchmark.name!r}", name, (*benchmark.controls, "scratch"))
        found |= dict.fromkeys(meant or [name])
    return list(found)


def _table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return a table of the columns in which something stands, with the names of the arms whole."""
    table = Table(box=None, pad_edge=False)
    headings = [heading for heading in max(rows, key=len) if any(row.get(heading) for row in rows)]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=heading == "arm")
    for row in rows:
        table.add_row(*(row.get(heading, "") for heading in headings))
    return table


def _cells(row: Row, benchmark: Benchmark, controls: Sequence[str]) -> dict[str, str]:
    """Return what stands in the line of an arm, by the heading of the column."""
    if row.value is None:
        return {"arm": row.arm, "accuracy": "failed"}
    speedup = row.speedup(next(iter(benchmark.engines), ""))
    return {
        "arm": row.arm,
        "rank": "" if row.role == "dense" else str(row.rank),
        "accuracy": f"{100 * row.value.mean:.2f} ± {100 * row.value.half_width:.2f}",
        "MACs": f"{row.mean('effective_macs') / 1e6:.1f} M",
        "effective": "" if row.effective_sparsity is None else f"{100 * row.effective_sparsity:.2f} %",
        "speedup": f"{speedup.mean:.2f}x" if speedup else "",
        **{control: _points(row, control) for control in controls},
    }


def _points(row: Row, control: str) -> str:
    if control not in row.against:
        return ""
    found = row.against[control]
    mark = {"better": " ▲", "worse": " ▼", "undecided": ""}[found.verdict]
    return f"{100 * found.difference.mean:+.2f}{mark}"


# ---------------------------------------------------------------------------------------------------------- live


@contextmanager
def _live(progress: Progress) -> Iterator[Callable[[Progress], None]]:
    """Show a table that grows; where there is no terminal, a line per finished run."""
    if not messages.is_terminal:
        seen = set(progress.done)

        def say(now: Progress) -> None:
            for id in now.done.keys() - seen:
                seen.add(id)
                record = now.done[id]
                value = f"{100 * record.value:.2f} %" if record.measured else "failed"
                count = f"[{len(now.done)}/{len(now.runs)}]"
                sys.stderr.write(f"{count} {record.run.label}: {value}, {record.machine.seconds['total']:.0f} s\n")
            sys.stderr.flush()

        yield say
        return
    with Live(_picture(progress), console=messages, refresh_per_second=4, transient=True) as live:
        yield lambda now: live.update(_picture(now))


def _picture(progress: Progress) -> Group:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    settings = list(dict.fromkeys(run.group[1:] for run in progress.runs))
    for granularity, budget in settings:
        table.add_column(f"{granularity} {budget}".strip(), justify="right")
    for arm in dict.fromkeys(run.arm for run in progress.runs):
        table.add_row(arm, *(_cell(progress, (arm, *setting)) for setting in settings))
    done = len(progress.done) + sum(progress.running.values())
    bar = ProgressBar(total=len(progress.runs), completed=done, width=40)
    under_way = [
        f"{run.label} {100 * progress.running[run.id]:.0f} %" for run in progress.runs if run.id in progress.running
    ]
    words = f"{len(progress.done)} of {len(progress.runs)} runs; now: {', '.join(under_way) or 'none'}"
    return Group(table, bar, Text(words, style="dim"))


def _cell(progress: Progress, group: Sequence[str]) -> str:
    """Return the mean so far with the number of seeds done, or how far the first run is."""
    runs: list[Any] = [run for run in progress.runs if run.group == tuple(group)]
    records = [progress.done[run.id] for run in runs if run.id in progress.done]
    values = [record.value for record in records if record.measured]
    text = f"{100 * sum(values) / len(values):.2f} " if values else "failed " if records else ""
    return f"{text}[dim]{len(records)}/{len(runs)}[/]" if runs else ""
