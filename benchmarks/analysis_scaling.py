"""Time and memory of trace and verify over the depth of a network: python -m benchmarks.analysis_scaling.

Two kinds of stacks, 12 to 192 blocks deep; each depth runs in a process of its own, which measures the peak of its
memory. CPU seconds on one thread. The bound: three forward passes and a millisecond per operation, twice the memory of
the model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from math import floor, log10
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from benchmarks import write_record
from benchmarks.networks import residual_stack, transformer_stack
from secateur.atomic import written_atomically

DEPTHS = (12, 24, 48, 96, 192)
NETWORKS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "transformer": transformer_stack,
    "residual": residual_stack,
}
LIMIT = 1.0
FIGURE = Path(__file__).parent.parent / "docs" / "images" / "analysis_scaling.svg"


def main() -> None:
    """Measure every depth, draw the figure, write the record."""
    rows = [_in_own_process(name, depth) for name in NETWORKS for depth in DEPTHS]
    with written_atomically(FIGURE) as temporary:
        temporary.write_text(draw(rows), encoding="utf-8")
    worst = max(row["trace_and_verify_s"] / row["allowed_s"] for row in rows)
    memory = max(row["extra_memory"] for row in rows if row["model_mb"] > 100)
    write_record(
        "analysis_scaling",
        {
            "claim": "CPU time of trace and verify over 12 to 192 blocks, relative to 3 forward passes plus 1 ms per "
            "operation (at most 1), and their memory relative to the model's (at most 2)",
            "result": f"{worst:.2f} and {memory:.2f}",
            "limit": LIMIT,
            "rows": rows,
        },
    )


def _in_own_process(name: str, depth: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.analysis_scaling", name, str(depth)],
        check=True,
        capture_output=True,
        text=True,
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(name: str, depth: int) -> dict[str, Any]:
    """Return the figures of one network."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    small, x_small = NETWORKS[name](2)
    assert sc.trace(small, x_small).verify(small).ok  # warm up
    model, x = NETWORKS[name](depth)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    counter = _Operations()
    with torch.no_grad(), counter:
        model(x)
    before = _peak()  # the model and the activations of a forward pass
    passes, analyses = [], []
    for _ in range(3):
        start = process_time()
        with torch.no_grad():
            model(x)
        ran = process_time()
        structure = sc.trace(model, x)
        assert structure.verify(model).ok
        analyses.append(process_time() - ran)
        passes.append(ran - start)
    forward = median(passes)
    return {
        "network": name,
        "depth": depth,
        "operations": counter.count,
        "model_mb": round(size / 1e6, 1),
        "forward_s": round(forward, 4),
        "trace_and_verify_s": round(median(analyses), 4),
        "allowed_s": round(3 * forward + 1e-3 * counter.count, 4),
        "extra_memory": round((_peak() - before) / size, 3),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 340, 60, 20, 20, 50
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #555 }
.axis { stroke: #8a929c; fill: none }
.transformer { stroke: #0072B2; fill: #0072B2 }
.residual { stroke: #D55E00; fill: #D55E00 }
polyline { fill: none !important; stroke-width: 2 }
.allowed { stroke-dasharray: 2 5 }
text.transformer, text.residual { stroke: none }
@media (prefers-color-scheme: dark) { text { fill: #bbb } .transformer { stroke: #56B4E9; fill: #56B4E9 } }
"""


def _times(row: dict[str, Any]) -> tuple[float, float]:
    return row["trace_and_verify_s"], row["allowed_s"]


def _step(largest: float) -> float:
    """Return a round number of which four reach the largest value."""
    scale = 10 ** floor(log10(largest / 4))
    return next(factor * scale for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if 4 * factor * scale >= largest)


def draw(rows: list[dict[str, Any]]) -> str:
    """Return the time over the number of operations as a drawing that can be read on light and on dark ground."""
    step_ops, step_s = _step(max(r["operations"] for r in rows)), _step(max(max(_times(r)) for r in rows))
    most_ops, most_s = 4 * step_ops, 4 * step_s
    across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(operations: float, seconds: float) -> tuple[float, float]:
        return LEFT + across * operations / most_ops, TOP + up * (1 - seconds / most_s)

    x_0, y_0 = place(0, 0)
    parts = [f'<path class="axis" d="M{x_0},{TOP}V{y_0}H{WIDTH - RIGHT}"/>']
    for i in range(5):
        operations, seconds = step_ops * i, step_s * i
        x, y = place(operations, seconds)
        parts.append(f'<text x="{x:.0f}" y="{y_0 + 18:.0f}" text-anchor="middle">{operations:,.0f}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{seconds:.1f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">ATen operations of one call</text>')
    parts.append(
        f'<text x="{LEFT + 8}" y="{TOP + 8}">CPU seconds; dotted: 3 forward passes + 1 ms per operation</text>'
    )
    for i, name in enumerate(NETWORKS):
        own = [row for row in rows if row["network"] == name]
        for kind, key in (("", "trace_and_verify_s"), (" allowed", "allowed_s")):
            points = [place(row["operations"], row[key]) for row in own]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline class="{name}{kind}" points="{line}"/>')
            if not kind:
                parts += [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        label = f"{name}, {own[0]['depth']} to {own[-1]['depth']} blocks"
        parts.append(f'<text class="{name}" x="{LEFT + 8}" y="{TOP + 28 + 18 * i}">{label}</text>')
    inside = "\n".join(parts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">'
    return f"{head}\n<style>{STYLE}</style>\n{inside}\n</svg>\n"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(measure(sys.argv[1], int(sys.argv[2]))) + "\n")
    else:
        main()
