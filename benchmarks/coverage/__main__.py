"""Runs all networks, each in processes of its own with a time limit, and prints the shares."""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from benchmarks import RESULTS
from benchmarks.coverage.table import line, shares
from benchmarks.coverage.zoo import names
from secateur.atomic import written_atomically
from secateur.environment import environment

FOLDER = RESULTS.parent / "coverage"
SECONDS = 900


def main() -> None:
    """Run what has no row yet; rows of failures are run again only when asked for by name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="a pattern of names, for example timm:*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="run networks that have a row, too")
    parser.add_argument("--no-onnx", action="store_true", help="leave the second process out")
    options = parser.parse_args()
    rows = read()
    todo = [n for n in names() if fnmatch.fnmatch(n, options.only) and (options.again or n not in rows)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(network, name, options.no_onnx) for name in todo]):
            row = future.result()
            rows[row["name"]] = row
            write(rows)
            print(line(row), flush=True)
    for library, cells in shares(rows.values()).items():
        print(f"{library:14}" + "  ".join(f"{name} {value}" for name, value in cells.items()))


def network(name: str, no_onnx: bool) -> dict[str, Any]:
    """Return the row of one network."""
    with tempfile.TemporaryDirectory() as folder:
        row = child("run", name, folder)
        if row["stages"].get("save") and not no_onnx:
            second = child("again", name, folder)
            row["stages"] |= second["stages"]
            row["seconds"] |= second["seconds"]
            row["failed"] = second["failed"]
    return row


def child(mode: str, name: str, folder: str) -> dict[str, Any]:
    """Return what a process of `one` reports."""
    row: dict[str, Any] = {"name": name, "stages": {}, "seconds": {}}
    command = [sys.executable, "-m", "benchmarks.coverage.one", mode, name, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {**row, "failed": f"{mode}: not done in {SECONDS} s"}
    if done.returncode != 0:
        return {**row, "failed": f"{mode}: exit code {done.returncode}: {done.stderr.strip()[-300:]}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def read() -> dict[str, dict[str, Any]]:
    """Return the rows that exist, by name."""
    path = FOLDER / "rows.json"
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Write all rows, in the order of the names."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    ordered = [rows[name] for name in sorted(rows)]
    with written_atomically(FOLDER / "rows.json") as temporary:
        temporary.write_text(json.dumps({"environment": environment(), "rows": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
