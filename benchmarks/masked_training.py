"""A training step under masks beside a dense one: python -m benchmarks.masked_training.

Both networks train in turn, step by step, in one process, so that a machine that slows down slows both.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F

from benchmarks import write_record
from secateur.core.masks import Masks
from secateur.tasks.networks import build_network

CASES = {"resnet20, batch 128": ("resnet20", 16, 28, 128), "vit, batch 32": ("vit", 192, 32, 32)}
ROUNDS = 25


def main() -> None:
    """Time both and write the record."""
    torch.set_num_threads(1)
    cases = {name: time_case(*case) for name, case in CASES.items()}
    worst = max(case["ratio"] for case in cases.values())
    claim = "a training step with 90 % of the weights masked, relative to a dense step (at most 1.05)"
    write_record("masked_training", {"claim": claim, "result": f"{worst:.3f}", "limit": 1.05, "cases": cases})


def time_case(network: str, width: int, size: int, batch: int) -> dict[str, float]:
    """Return milliseconds per step of both, and the median of the ratios of neighboring steps."""
    torch.manual_seed(0)
    steps = {}
    for masked in (False, True):
        model = build_network(network, width, size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        if masked:
            masks = {name: torch.rand(p.shape) < 0.1 for name, p in model.named_parameters() if p.dim() > 1}
            Masks(model, masks).attach(optimizer)
        steps[masked] = (model, optimizer)
    x, y = torch.randn(batch, 1, size, size), torch.randint(0, 10, (batch,))

    def step(masked: bool) -> float:
        model, optimizer = steps[masked]
        start = perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return perf_counter() - start

    for _ in range(3):
        step(False), step(True)
    times = [(step(False), step(True)) for _ in range(ROUNDS)]
    return {
        "dense_ms": round(1000 * median(dense for dense, _ in times), 2),
        "masked_ms": round(1000 * median(masked for _, masked in times), 2),
        "ratio": round(median(masked / dense for dense, masked in times), 4),
    }


if __name__ == "__main__":
    main()
