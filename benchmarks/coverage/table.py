"""What the rows say together."""

from __future__ import annotations

from collections.abc import Collection
from statistics import median
from typing import Any

STAGES = ("trace", "verify", "prune", "step", "save", "load", "onnx")
LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "Hugging Face"}


def line(row: dict[str, Any]) -> str:
    """Return a row in one line: an x for each stage that was passed."""
    marks = "".join("x" if row["stages"].get(stage) else "." for stage in STAGES)
    return (
        f"{row['name']:45} {marks} share {row.get('prunable_share', 0):.3f} macs {row.get('macs', 0):.3f} "
        f"{sum(row['seconds'].values()):6.1f} s  {row['failed'][:200]} {row.get('unproved') or ''}"
    )


def shares(rows: Collection[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return, by library, how many networks were run, how many passed each stage, and the median prunable share.

    A stage that was not run for a network is not counted for it.
    """
    table = {}
    for key, title in LIBRARIES.items():
        own = [row for row in rows if row["name"].startswith(f"{key}:")]
        if own:
            cells = {"networks": str(len(own))}
            for stage in STAGES:
                tried = [row for row in own if stage in row["stages"] or "save" not in row["stages"]]
                passed = sum(bool(row["stages"].get(stage)) for row in tried)
                cells[stage] = f"{passed} of {len(tried)}"
            cells["prunable"] = f"{100 * median(row.get('prunable_share', 0.0) for row in own):.1f} %"
            table[title] = cells
    return table
