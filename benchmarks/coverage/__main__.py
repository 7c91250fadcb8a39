"""Runs all networks, several at a time, and prints the shares."""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import nn

from benchmarks import RESULTS
from benchmarks.coverage import one, torch_pruning
from benchmarks.coverage.processes import FORK, in_child
from benchmarks.coverage.table import PEERS, line, page, shares
from benchmarks.coverage.zoo import build, names
from secateur.atomic import written_atomically
from secateur.environment import environment
from secateur.tasks.zoo import allow_torchvision

FOLDER = RESULTS.parent / "coverage"
PACKAGES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}


def main() -> None:
    """Run what has no row yet; what has one is run again only when asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="patterns of names, for example timm:*,hf:bert")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="run networks that have a row, too")
    parser.add_argument("--failed", action="store_true", help="run networks whose row is a failure, too")
    options = parser.parse_args()
    rows = read()
    todo = [
        name
        for name in names()
        if any(fnmatch.fnmatch(name, pattern) for pattern in options.only.split(","))
        and (options.again or name not in rows or (options.failed and rows[name]["failed"]))
    ]
    for row in run(todo, options.jobs):
        rows[row["name"]] = row
        write(rows)
        print(line(row), flush=True)
    for title, cells in shares(rows.values()).items():
        print(f"{title:14}" + "  ".join(f"{name} {value}" for name, value in cells.items()))


def run(todo: list[str], jobs: int) -> Iterable[dict[str, Any]]:
    """Yield a row per network as each is done. The libraries are imported once; every piece of work is a fork."""
    prepare()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    with ProcessPoolExecutor(jobs, mp_context=FORK) as pool:
        for future in as_completed([pool.submit(network, name) for name in todo]):
            yield {**future.result(), "commit": commit.stdout.strip()}


def prepare() -> None:
    """Import what every network needs, and let the ONNX exporter fill its tables."""
    torch.set_num_threads(1)
    allow_torchvision()
    import timm
    import torch_pruning as tp
    import transformers

    from secateur.deploy import onnx

    assert timm and tp and transformers.AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        onnx.export(nn.Linear(2, 2).eval(), torch.zeros(2, 2), Path(folder) / "first.onnx")


def network(name: str) -> dict[str, Any]:
    """Return the row of one network, which is built once: the forks get it as it is."""
    library = PACKAGES[name.partition(":")[0]]
    row: dict[str, Any] = {"name": name, "library": f"{library} {version(library)}", "failed": ""}
    start = process_time()
    model, inputs = build(name)
    row |= {"stages": {}, "seconds": {"build": round(process_time() - start, 3)}}
    with tempfile.TemporaryDirectory() as folder:
        _add(row, "run", in_child(one.run, model, inputs, Path(folder)))
        if row["stages"].get("save"):
            _add(row, "again", in_child(one.again, name, inputs, Path(folder)))
    row["torch_pruning"] = peer(model, inputs)
    return row


def _add(row: dict[str, Any], what: str, result: dict[str, Any]) -> None:
    """Put what one process reports into the row."""
    for key in ("stages", "seconds"):
        row[key] |= result.pop(key, {})
    row["peak_mb"] = max(row.get("peak_mb", 0), result.pop("peak_mb", 0))
    if "crashed" in result:
        row["failed"] = f"{what}: {result.pop('crashed')}"
    row |= result


def peer(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return what Torch-Pruning makes of a network with each of its settings, until one is right."""
    results: dict[str, Any] = {}
    for setting in torch_pruning.settings_for(model):
        result = in_child(torch_pruning.compare, model, inputs, setting)
        if "crashed" in result:
            result = {"verdict": "fails", "reason": result["crashed"]}
        results[setting] = result
        if result["verdict"] == "right" or result.get("reason", "").startswith("not done"):
            break
    return results


def read() -> dict[str, dict[str, Any]]:
    """Return the rows that exist, by name."""
    path = FOLDER / "rows.json"
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Write all rows, in the order of the names, and the page that shows them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    listed = Counter(name.partition(":")[0] for name in names())
    record = {"environment": environment(), "listed": listed, "rows": [rows[name] for name in sorted(rows)]}
    with written_atomically(FOLDER / "rows.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
    with written_atomically(FOLDER / "README.md") as temporary:
        temporary.write_text(page(record, PEERS), encoding="utf-8")


if __name__ == "__main__":
    main()
