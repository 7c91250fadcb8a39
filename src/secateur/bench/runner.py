"""Runs what is missing of a benchmark: dense references first, then everything that prunes them."""

from __future__ import annotations

import fcntl
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

from secateur.bench.benchmarks import Benchmark
from secateur.bench.executors import Executor
from secateur.bench.jobs import Workplace
from secateur.bench.plan import dense_run
from secateur.bench.records import Record, Run
from secateur.bench.store import Store, own_reasons
from secateur.errors import AlreadyRunning

ATTEMPTS = 3
"""How often a job is started whose process dies."""

POLL_SECONDS = 0.5

Again = Literal["none", "failed", "unofficial"]
"""Which records are made anew: none, those of failed runs, or all that cannot be official as they are."""


@dataclass
class Progress:
    """Where a benchmark run is.

    Attributes:
        runs: Everything that was asked for.
        done: The records there are, by run id.
        running: Finished fraction of the jobs under way, by run id.
        problems: What went wrong and is still to be done, in words.
    """

    runs: tuple[Run, ...]
    done: dict[str, Record] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[Run]:
        """The runs without a record."""
        return [run for run in self.runs if run.id not in self.done]

    @property
    def left(self) -> int:
        """Number of runs without a record."""
        return len(self.runs) - len(self.done)

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records of runs that failed."""
        return tuple(record for record in self.done.values() if record.status == "failed")


OnChange = Callable[[Progress], None]


def survey(runs: Sequence[Run], store: Store) -> Progress:
    """Return what is to be done and what is there already."""
    found = {run.id: record for run in runs if (record := store.find(run)) is not None}
    return Progress(tuple(runs), found)


def forget(progress: Progress, store: Store, place: Workplace, benchmark: Benchmark, again: Again) -> None:
    """Delete the records that are to be made anew, and the dense networks of such runs; changes `progress`."""
    for id, record in list(progress.done.items()):
        failed = record.status == "failed"
        if (again == "failed" and failed) or (again == "unofficial" and own_reasons(record, benchmark)):
            del progress.done[id]
            store.path(record.run).unlink()
            for suffix in (".json", ".safetensors"):  # the first says that the second is whole
                place.network(record.run).with_suffix(suffix).unlink(missing_ok=True)


def take_over(progress: Progress, store: Store, benchmark: Benchmark) -> None:
    """Write records of what other benchmarks in the same folder have from equal work; changes `progress`."""
    for record in store.made_for_others(progress.missing, benchmark):
        progress.done[record.id] = store.publish(record)


def run_benchmark(
    progress: Progress, store: Store, executor: Executor, on_change: OnChange = lambda _: None
) -> Progress:
    """Run everything of `progress` that has no record, and return it.

    A job whose process dies is started again, up to three times. After a problem that every job would meet (a full
    disk, missing data) nothing new is started. Whatever is left is done by the next call.

    Args:
        progress: What is to be done and what is there; changed in place.
        store: Where jobs put their records.
        executor: Where jobs run.
        on_change: Called about twice a second.
    """
    waiting = progress.missing
    attempts: Counter[str] = Counter()
    halted = False
    while waiting or progress.running:
        unfinished = {run.id for run in waiting} | progress.running.keys()
        ready = [run for run in waiting if run.role == "dense" or dense_run(run).id not in unfinished]
        for run in [] if halted else ready[: executor.capacity - len(progress.running)]:
            executor.submit(run)
            attempts[run.id] += 1
            waiting.remove(run)
            progress.running[run.id] = 0.0
        if halted and not progress.running:
            break
        for ended in executor.wait(POLL_SECONDS):
            del progress.running[ended.run.id]
            record = store.find(ended.run)
            if record is not None:
                progress.done[record.id] = record
            elif ended.problem != "halt" and attempts[ended.run.id] < ATTEMPTS:
                waiting.insert(0, ended.run)
            else:
                progress.problems.append(ended.message or f"{ended.run.label} left no record")
                halted = halted or ended.problem == "halt" or ended.run.role == "dense"
        progress.running.update(executor.progress())
        on_change(progress)
    return progress


def sweep(*folders: Path) -> None:
    """Delete the half-written files that killed jobs left; only the one runner of these folders may do so."""
    for folder in folders:
        for path in folder.rglob(".*"):
            if path.is_file():
                path.unlink()


@contextmanager
def only_runner(folder: Path) -> Iterator[None]:
    """Hold the lock of a scratch folder; it is free again when this process ends, however it ends.

    Raises:
        AlreadyRunning: Another runner works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "runner.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(
                f"Another runner is at work in {folder}. Wait for it, or choose another folder with --scratch."
            ) from error
        yield


# ------------------------------------------------------------------------------------------------------ estimates


@dataclass(frozen=True)
class Estimate:
    """What the missing runs will take.

    Attributes:
        seconds: Wall time with so many jobs side by side.
        known: Number of runs whose kind was timed before.
        missing: Number of runs to do.
    """

    seconds: float
    known: int
    missing: int


def estimate(progress: Progress, earlier: Sequence[Record], jobs: int) -> Estimate:
    """Return what the missing runs will take, from the times of earlier records of the benchmark.

    A run takes as long as the median of its group; where there is none, of all records of its role and granularity. As
    far as records know it, what counts is the time of processors: others may have shared the machine.
    """
    times: dict[tuple[str, ...], list[float]] = {}
    for record in earlier:
        for key in _keys(record.run):
            seconds = record.machine.seconds
            times.setdefault(key, []).append(seconds.get("cpu", seconds["total"]))
    missing = progress.missing
    found = [next((median(times[key]) for key in _keys(run) if key in times), None) for run in missing]
    known = [seconds for seconds in found if seconds is not None]
    each = sum(known) / len(known) if known else 0.0
    return Estimate((sum(known) + each * (len(found) - len(known))) / jobs, len(known), len(missing))


def _keys(run: Run) -> tuple[tuple[str, ...], ...]:
    return run.group, (run.role, run.granularity)
