"""Taylor scores beside the forward and backward passes that they need: python -m benchmarks.scoring_cost."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from benchmarks import write_record
from secateur.core.slots import Scope
from secateur.methods.taylor import Taylor
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.weight import Weight
from secateur.tasks.networks import build_network

ROUNDS = 7


def main() -> None:
    """Time both in turn and write the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_network("resnet20", 16, 28).eval()
    data = [(torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))) for _ in range(6)]
    cases = {}
    for granularity in (Weight(), Channel()):
        units = granularity.units(model, data[0][0][:1], Scope())
        passes(model, data), Taylor().score(sc.Context(units, data))
        times = []
        for _ in range(ROUNDS):
            start = perf_counter()
            passes(model, data)
            middle = perf_counter()
            Taylor().score(sc.Context(units, data))
            times.append((middle - start, perf_counter() - middle))
        cases[granularity.name] = {
            "passes_s": round(median(a for a, _ in times), 3),
            "scoring_s": round(median(b for _, b in times), 3),
            "ratio": round(median(b / a for a, b in times), 4),
        }
    worst = max(case["ratio"] for case in cases.values())
    claim = "Taylor scores, relative to the forward and backward passes that they need (at most 1.15)"
    write_record("scoring_cost", {"claim": claim, "result": f"{worst:.3f}", "limit": 1.15, "cases": cases})


def passes(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """One forward and one backward pass per batch, and nothing else."""
    parameters = [p for p in model.parameters() if p.dim() > 1]
    for x, y in data:
        torch.autograd.grad(F.cross_entropy(model(x), y), parameters)


if __name__ == "__main__":
    main()
