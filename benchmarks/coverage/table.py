"""What the rows say together, for us and for Torch-Pruning."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = Mapping[str, Any]

PEERS: list[str] = json.loads((Path(__file__).parent / "peers.json").read_text(encoding="utf-8"))
"""62 architectures on which Torch-Pruning was tried before this package existed."""

STAGES = ("trace", "verify", "prune", "right", "step", "save", "load", "onnx")
LIBRARIES = {"hf": "Hugging Face", "torchvision": "torchvision", "timm": "timm"}
VERDICTS = ("right", "wrong", "no-op", "fails")
TRACE_VERIFY_PRUNE = STAGES[:3]


def line(row: Row) -> str:
    """Return a row in one line: an x for each stage that was passed."""
    marks = "".join("x" if row["stages"].get(stage) else "." for stage in STAGES)
    return (
        f"{row['name']:45} {marks} share {row.get('prunable_share', 0):.3f} macs {row.get('macs', 0):.3f} "
        f"{sum(row['seconds'].values()):6.1f} s  {row['failed'][:200]} {row.get('unproved') or ''} | peer: "
        + ", ".join(f"{s} {r['verdict']} {r.get('reason', '')[:80]}" for s, r in row["torch_pruning"].items())
    )


def failure(row: Row) -> str:
    """Return why a network failed, without the colors of the terminal that the message was made for."""
    return re.sub(r"\x1b\[[0-9;]*m", "", row["failed"])


def shares(rows: Collection[Row], listed: Mapping[str, int] | None = None) -> dict[str, dict[str, str]]:
    """Return, by library, how many networks were run, how many passed each stage, and the median prunable share.

    With `listed`, how many networks of each library there are to run, libraries without a row are shown, too.
    """
    table = {}
    for key, title in LIBRARIES.items():
        own = [row for row in rows if row["name"].startswith(f"{key}:")]
        if own or listed:
            cells = {"listed": str(listed[key])} if listed else {}
            cells["networks"] = str(len(own))
            cells |= {stage: str(sum(bool(row["stages"].get(stage)) for row in own)) for stage in STAGES}
            cells["prunable"] = f"{100 * median(r.get('prunable_share', 0.0) for r in own):.1f} %" if own else ""
            table[title] = cells
    return table


# ------------------------------------------------------------------------------------------ beside Torch-Pruning


def our_verdict(row: Row) -> str:
    """Return what became of a network with secateur: one of `VERDICTS`."""
    stages = row["stages"]
    if stages.get("right"):
        return "right"
    return "wrong" if "right" in stages else "fails"


def plain_verdict(row: Row) -> str:
    """Return what became of it with Torch-Pruning as its README says."""
    verdict: str = row["torch_pruning"]["plain"]["verdict"]
    return verdict


def helped_verdict(row: Row) -> str:
    """Return the best of what became of it with all of Torch-Pruning's settings."""
    found = {result["verdict"] for result in row["torch_pruning"].values()}
    return next(verdict for verdict in ("right", "no-op", "fails", "wrong") if verdict in found)


TOOLS: dict[str, Callable[[Row], str]] = {
    "secateur": our_verdict,
    "Torch-Pruning": plain_verdict,
    "Torch-Pruning with help": helped_verdict,
}


def verdicts(rows: Collection[Row], peers: Sequence[str]) -> list[tuple[str, ...]]:
    """Return one line per library, and one for the 62 architectures of `peers`, and tool: counts of the verdicts."""
    groups = {title: [r for r in rows if r["name"].startswith(f"{key}:")] for key, title in LIBRARIES.items()}
    groups[f"the {len(peers)} architectures"] = [row for row in rows if row["name"] in set(peers)]
    lines = []
    for title, own in groups.items():
        if not own:
            continue
        for tool, verdict in TOOLS.items():
            counts = Counter(map(verdict, own))
            lines.append((title, tool, str(len(own)), *(str(counts[v]) for v in VERDICTS), _seconds(own, tool)))
    return lines


def _seconds(rows: Collection[Row], tool: str) -> str:
    """Return the median time of the networks that come out right."""
    if tool == "secateur":
        times = [sum(r["seconds"][s] for s in TRACE_VERIFY_PRUNE) for r in rows if our_verdict(r) == "right"]
    elif tool == "Torch-Pruning":
        times = [r["torch_pruning"]["plain"]["seconds"] for r in rows if plain_verdict(r) == "right"]
    else:
        rights = [[x for x in r["torch_pruning"].values() if x["verdict"] == "right"] for r in rows]
        times = [found[0]["seconds"] for found in rights if found]
    return f"{median(times):.1f}" if times else ""


VERDICT_HEAD = ("networks of", "tool", "tried", *VERDICTS, "median s")


# --------------------------------------------------------------------------------------------------- the page


def page(record: Mapping[str, Any], peers: Sequence[str]) -> str:
    """Return the page ``results/coverage/README.md``."""
    rows = record["rows"]
    machine = record["environment"]
    table = shares(rows, record["listed"])
    parts = [
        "# Coverage",
        "Made by `python -m benchmarks.coverage`; do not edit. Each network has random weights. Seconds are processor "
        f"time of one thread on {machine['processor']}, torch {machine['torch']}.",
        "## Stages passed",
        markdown_table(
            ("library", *next(iter(table.values()))), [(title, *cells.values()) for title, cells in table.items()]
        )
        if table
        else "",
        "## Beside Torch-Pruning 1.6.1",
        markdown_table(VERDICT_HEAD, verdicts(rows, peers)),
        "## Failures",
        "\n".join(f"- `{row['name']}`: {failure(row)}" for row in rows if row["failed"]) or "None.",
        "## All networks",
        "Stages: " + ", ".join(STAGES) + ". Seconds: trace, verify and prune; load and ONNX export. * marks the "
        f"{len(peers)} architectures. Torch-Pruning: its best setting.",
        markdown_table(
            ("network", "stages", "prunable", "MACs", "s", "s onnx", "peak MB", "Torch-Pruning", "s", "reason"),
            [_cells(row, peers) for row in rows],
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(row: Row, peers: Sequence[str]) -> tuple[str, ...]:
    seconds = row["seconds"]
    verdict = helped_verdict(row)
    setting, peer = next((s, r) for s, r in row["torch_pruning"].items() if r["verdict"] == verdict)
    plain = row["torch_pruning"]["plain"]["verdict"]
    return (
        f"`{row['name']}`{' *' if row['name'] in peers else ''}",
        "".join("x" if row["stages"].get(stage) else "." for stage in STAGES),
        f"{100 * row.get('prunable_share', 0):.1f} %",
        f"{row.get('macs', 1):.3f}",
        f"{sum(seconds.get(stage, 0) for stage in TRACE_VERIFY_PRUNE):.1f}",
        f"{seconds.get('load', 0) + seconds.get('onnx', 0):.1f}",
        str(row["peak_mb"]),
        verdict if setting == "plain" else f"{verdict} ({setting}; plain: {plain})",
        f"{peer['seconds']:.1f}" if "seconds" in peer else "",
        peer.get("reason", "").replace("|", "/")[:120],
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
