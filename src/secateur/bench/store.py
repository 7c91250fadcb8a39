"""The folder of records: where each one lies, how it gets there, which of them count."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.atomic import written_atomically
from secateur.bench import RESULTS
from secateur.bench.benchmarks import Benchmark, benchmark_names, find_benchmark
from secateur.bench.records import Record, Run, read_record, to_text
from secateur.errors import InvalidRecord


@dataclass(frozen=True)
class Refused:
    """A file that is no valid record, and why."""

    path: Path
    reason: str


class Store:
    """Records below one folder: ``BENCHMARK/ARM-GRANULARITY-BUDGET-seedN-ID.json``.

    Args:
        folder: Is made when the first record is written.
    """

    def __init__(self, folder: str | os.PathLike[str] = RESULTS) -> None:
        self.folder = Path(folder)

    def path(self, run: Run) -> Path:
        """Return where the record of a run lies."""
        return self.folder / _place(run, run.id)

    def path_of(self, record: Record) -> Path:
        """Return where a record lies; does not hash its run again."""
        return self.folder / _place(record.run, record.id)

    def find(self, run: Run) -> Record | None:
        """Return the record of a run; None if there is none, or if what lies there is refused."""
        path = self.path(run)
        if not path.is_file():
            return None
        try:
            record = read_record(path)
        except InvalidRecord:
            return None
        return record if record.id == run.id else None

    def publish(self, record: Record, replace: bool = False) -> Record:
        """Write a record, whole or not at all, and return the one that is there afterwards.

        Args:
            record: The record.
            replace: Whether it takes the place of a valid one of the same run; otherwise the first one stays, so that
                two workers that run the same cannot change what others have read.

        Raises:
            OSError: The disk is full or cannot be written to; nothing is left behind.
        """
        path = self.path_of(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = None if replace else self.find(record.run)
        if found is not None:
            return found
        with written_atomically(path) as temporary:
            temporary.write_text(to_text(record), encoding="utf-8")
        return record

    def read(self, benchmark: str | None = None) -> tuple[list[Record], list[Refused]]:
        """Return all records of a benchmark (default: of all), in the order of their files, and the files refused."""
        records: list[Record] = []
        refused: list[Refused] = []
        for path in self._files(benchmark):
            try:
                record = read_record(path)
                if path != self.path_of(record):
                    raise InvalidRecord(f"{path} holds the record of another run, {record.run.label}.")
                records.append(record)
            except InvalidRecord as error:
                refused.append(Refused(path, str(error)))
        return records, refused

    def made_for_others(self, runs: Iterable[Run], benchmark: Benchmark) -> list[Record]:
        """Return, as records of these runs, what other benchmarks in the same folder have from equal work.

        Only what could be official, there as they are now and here, and was timed in the engines of this benchmark.
        """
        wanted: dict[str, list[Run]] = defaultdict(list)
        for run in runs:
            wanted[run.work].append(run)
        others = {name: find_benchmark(name) for name in benchmark_names() if name != benchmark.name}
        found = []
        for record in self.read(str(Path(benchmark.name).parent))[0] if wanted else ():
            other = others.get(record.run.benchmark)
            timed = not record.machine.latency or set(record.machine.latency) == set(benchmark.engines)
            if other is None or not timed or own_reasons(record, other):
                continue
            for run in wanted.get(record.run.work, ()):
                reported = tuple(r for r in benchmark.reported if r.is_about(run))
                ours = record.model_copy(update={"run": run, "id": run.id, "reported": reported})
                found += [] if own_reasons(ours, benchmark) else [ours]
        return found

    def _files(self, benchmark: str | None) -> Iterator[Path]:
        folder = self.folder / benchmark if benchmark else self.folder
        yield from sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))


def _place(run: Run, id: str) -> str:
    words = [run.arm] if run.role == "dense" else [*run.group]
    return f"{run.benchmark}/{'-'.join([*words, f'seed{run.seed}', id[:8]])}.json"


def standing(records: Iterable[Record], benchmark: Benchmark) -> dict[str, tuple[str, ...]]:
    """Return, by record id, why a record is not official; nothing for one that is.

    Args:
        records: All records of one benchmark.
        benchmark: As it is now.
    """
    records = list(records)
    alone = {record.id: own_reasons(record, benchmark) for record in records}
    seeds: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for record in records:
        if not alone[record.id]:
            seeds[record.run.group].add(record.run.seed)
    needed = benchmark.official.seeds
    return {
        record.id: alone[record.id]
        or (() if len(seeds[record.run.group]) >= needed else (_too_few(len(seeds[record.run.group]), needed),))
        for record in records
    }


def own_reasons(record: Record, benchmark: Benchmark) -> tuple[str, ...]:
    """Return why a record cannot be official, whatever stands beside it."""
    rules, run, reasons = benchmark.official, record.run, []
    if run.version != benchmark.version:
        reasons.append(f"made for version {run.version} of the benchmark; it has version {benchmark.version} now")
    if rules.clean_tree and record.code.commit is None:
        reasons.append("made outside a git checkout, so its code is not known")
    elif rules.clean_tree and not record.code.clean:
        reasons.append("made with changes that were not committed")
    if record.measured is None:
        reasons.append("failed")
    elif rules.timed and record.measured.smaller and not record.machine.latency:
        reasons.append("the compact network was not timed")
    return tuple(reasons)


def _too_few(found: int, needed: int) -> str:
    return f"{found} seed{'s' if found != 1 else ''} of at least {needed}"
