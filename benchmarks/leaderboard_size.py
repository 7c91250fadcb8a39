"""How long the pages of many records take: python -m benchmarks.leaderboard_size [--records 100000].

The records are made up, lie in a temporary folder and never leave it: 20 benchmarks, each with as many arms as needed,
at 4 budgets with 3 seeds. Where Chromium and selenium are, the largest page of a benchmark is opened, filtered and
sorted.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any
from unittest.mock import patch

from benchmarks import write_record
from secateur.bench.benchmarks import Benchmark, find_benchmark
from secateur.bench.site import build
from secateur.bench.store import Store
from secateur.errors import MissingDependency
from secateur.optional import optional_import
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
            start, work = perf_counter(), process_time()
            boards = build.build_site(store, Path(folder) / "site")
            seconds, work = perf_counter() - start, process_time() - work
        pages = [path for path in (Path(folder) / "site").rglob("*") if path.is_file()]
        largest = max(p.stat().st_size for p in pages if p.suffix == ".html")
        board = max((p for p in pages if p.parent.name == "benchmarks"), key=lambda p: p.stat().st_size)
        board_mb, in_browser = round(board.stat().st_size / 1e6, 2), use(board)
    write_record(
        "leaderboard_size",
        {
            "claim": "pages of 100,000 made-up records, seconds (under 60)",
            "result": f"{seconds:.0f}",
            "limit": 60,
            "processor_seconds": round(work, 1),
            "records": sum(len(board.records) for board in boards),
            "benchmarks": BENCHMARKS,
            "lines_per_page": len(boards[0].entries),
            "files": len(pages),
            "largest_page_mb": round(largest / 1e6, 2),
            "largest_board_mb": board_mb,
            "in_browser": in_browser,
        },
    )


ACTIONS = {
    "filter_seconds": """
        const box = document.getElementsByName("search")[0];
        box.value = "made-up-1";
        box.dispatchEvent(new Event("input", {bubbles: true}));""",
    "filter_away_seconds": """
        const box = document.getElementsByName("search")[0];
        box.value = "";
        box.dispatchEvent(new Event("input", {bubbles: true}));""",
    "sort_seconds": """
        const headings = [...document.querySelectorAll("#table thead button")];
        headings.find((heading) => heading.textContent.startsWith("accuracy")).click();""",
}
PAINTED = "const done = arguments[0]; requestAnimationFrame(() => setTimeout(done));"
"""After the next picture is on the screen."""


def use(page: Path) -> dict[str, Any]:
    """Return how long a headless Chromium takes to show a page of a benchmark, to filter and to sort it."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        webdriver: Any = optional_import("selenium.webdriver", "slow-tests")
    except MissingDependency:
        return {"absent": "selenium"}
    if not (chromium and driver):
        return {"absent": "chromium or chromedriver"}
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.get("about:blank")  # the start of the browser is not the page's
        browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        start = perf_counter()
        browser.get(page.as_uri())
        browser.execute_async_script(PAINTED)
        found: dict[str, Any] = {"load_seconds": round(perf_counter() - start, 2)}
        metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        work = next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")
        found["load_processor_seconds"] = round(work, 2)  # what the page costs, however busy the machine is
        for name, action in ACTIONS.items():
            start = perf_counter()
            browser.execute_async_script(action + PAINTED)
            found[name] = round(perf_counter() - start, 2)
        found["version"] = browser.capabilities["browserVersion"]
        return found
    finally:
        browser.quit()


def made_up(n: int) -> Iterator[Benchmark]:
    """Yield benchmarks like the smallest real one, under other names."""
    real = find_benchmark("digits/resnet8")
    for i in range(n):
        yield real.model_copy(update={"name": f"made-up/benchmark-{i:02}", "title": f"Made-up benchmark {i}"})


if __name__ == "__main__":
    main()
