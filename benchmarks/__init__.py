"""Measurements that claims rest on; each is run by hand and writes its record to ``results/benchmarks/``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.atomic import written_atomically
from secateur.environment import environment

RESULTS = Path(__file__).parent.parent / "results" / "benchmarks"


def over_seeds(label: str, seeds: Sequence[int], run: Callable[[int], Mapping[str, float]]) -> dict[str, Any]:
    """Return the figures of one arm: for each of them, the values of all seeds."""
    runs = [run(seed) for seed in seeds]
    return {"label": label, **{key: [found[key] for found in runs] for key in runs[0]}}


def write_record(name: str, record: dict[str, Any]) -> None:
    """Write a record, with the facts about the machine, and print it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {**record, "environment": environment()}
    text = json.dumps(record, indent=1)
    with written_atomically(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)
