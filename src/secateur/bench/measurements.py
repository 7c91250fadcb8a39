"""What a record says of a network: its latency, its hash, what it reached; and the time and memory that this took."""

from __future__ import annotations

import hashlib
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from time import perf_counter, process_time

import torch
from torch import nn

from secateur.bench.records import Metric, Quantiles, Timing
from secateur.measure.latency import compare_latency
from secateur.pruned import Pruned
from secateur.structure.inputs import state_of


def share(value: float, n: int) -> Metric:
    """Return a share of n samples with its 95 % interval (Wilson 1927)."""
    z = 1.959963984540054
    center = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return Metric(value=value, low=min(value, max(0.0, center - half)), high=max(value, center + half), n=n)


def reached(pruned: Pruned) -> float:
    """Return the budgeted quantity of a pruned network in the unit of the budget."""
    kind = pruned.budget.kind
    cost = pruned.rounds[-1].cost
    if kind == "sparsity":
        return 1 - cost / _units(pruned)
    dense = {"macs": pruned.before.macs, "params": pruned.before.params}.get(kind, 1)
    return cost / dense


def _units(pruned: Pruned) -> int:
    """Return the number of units before pruning."""
    if pruned.structure is not None:
        return sum(axis.size for axis in pruned.structure.prunable)
    return sum(mask.numel() for mask in pruned.masks.values())


def timings(dense: nn.Module, pruned: Pruned, engines: tuple[str, ...]) -> dict[str, Timing]:
    """Return the latency of a smaller network beside the dense one, by engine."""
    found = {}
    for engine in engines:
        both = compare_latency({"dense": dense, "pruned": pruned.model}, pruned.inputs, engine)
        one = both["pruned"]
        found[engine] = Timing(
            engine=engine,
            threads=one.threads,
            batch=one.batch,
            dtype=one.dtype,
            **{name: Quantiles(p50_ms=x.p50_ms, p90_ms=x.p90_ms, n=x.n) for name, x in both.items()},
        )
    return found


def weights_hash(model: nn.Module) -> str:
    """Return a hash of all parameters and buffers: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_of(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Stopwatch:
    """Wall time by phase, and processor time, which tells on a shared machine what a job really costs."""

    def __init__(self) -> None:
        self._start, self._cpu = perf_counter(), process_time()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a phase, which is what the block does."""
        start = perf_counter()
        yield
        self._phases[phase] = perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, in all, and of processors (``cpu``)."""
        found = {**self._phases, "total": perf_counter() - self._start, "cpu": process_time() - self._cpu}
        return {phase: round(seconds, 2) for phase, seconds in found.items()}


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
