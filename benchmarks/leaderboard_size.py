"""How long the pages of many records take: python -m benchmarks.leaderboard_size [--records 100000].

The records are made up, lie in a temporary folder and never leave it: 20 benchmarks, each with as many arms as needed,
at 4 budgets with 3 seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

from benchmarks import write_record
from secateur.bench.benchmarks import Benchmark, find_benchmark
from secateur.bench.site import build
from secateur.bench.store import Store
from secateur.testing.records import records

BENCHMARKS = 20
SEED_RECORDS = 36
"""Of one benchmark with the controls and methods that exist, roughly; each further arm adds 12."""


def main() -> None:
    """Write the records, time the pages, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    wanted = parser.parse_args().records
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "records")
        definitions = {b.name: b for b in made_up(BENCHMARKS)}
        arms = [f"made-up-{i:03}" for i in range(max(1, (wanted // BENCHMARKS - SEED_RECORDS) // 12))]
        written = 0
        for definition in definitions.values():
            for record in records(definition, arms):
                store.publish(record)
                written += 1
        print(f"{written:,} records written")
        with (
            patch.object(build, "benchmark_names", lambda: tuple(definitions)),
            patch.object(build, "find_benchmark", definitions.__getitem__),
        ):
            start = perf_counter()
            boards = build.build_site(store, Path(folder) / "site")
            seconds = perf_counter() - start
        pages = [path for path in (Path(folder) / "site").rglob("*") if path.is_file()]
        largest = max(p.stat().st_size for p in pages if p.suffix == ".html")
    write_record(
        "leaderboard_size",
        {
            "claim": "pages of 100,000 made-up records, seconds (under 60)",
            "result": f"{seconds:.0f}",
            "limit": 60,
            "records": sum(len(board.records) for board in boards),
            "benchmarks": BENCHMARKS,
            "lines_per_page": len(boards[0].entries),
            "files": len(pages),
            "largest_page_mb": round(largest / 1e6, 2),
        },
    )


def made_up(n: int) -> Iterator[Benchmark]:
    """Yield benchmarks like the smallest real one, under other names."""
    real = find_benchmark("digits/resnet8")
    for i in range(n):
        yield real.model_copy(update={"name": f"made-up/benchmark-{i:02}", "title": f"Made-up benchmark {i}"})


if __name__ == "__main__":
    main()
