"""Records of runs that never happened, to test what is made of records. None of them may leave a temporary folder."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from secateur.bench.benchmarks import Benchmark
from secateur.bench.plan import plan
from secateur.bench.records import (
    Code,
    Failure,
    Machine,
    Measured,
    Metric,
    Quantiles,
    Record,
    Run,
    Size,
    Timing,
    Training,
)

DENSE = Size(params=100_000, nonzero_params=100_000, macs=10_000_000, effective_macs=10_000_000, bytes=400_000)
CODE = Code(version="0.1.0", commit="0" * 40, clean=True)


def records(benchmark: Benchmark, arms: Sequence[str] = (), seeds: Sequence[int] = (0, 1, 2)) -> Iterator[Record]:
    """Yield a record for each run that a benchmark asks for, and for further arms with made-up names."""
    runs = plan(benchmark, benchmark.task.data or "0" * 16, seeds=seeds)
    for run in runs:
        yield record(run)
        if run.arm == "magnitude":
            yield from (record(run.model_copy(update={"arm": arm, "role": "method"})) for arm in arms)


def record(run: Run, value: float | None = None, code: Code = CODE, failed: bool = False) -> Record:
    """Return a record of a run with a plausible result, the same for the same run."""
    draw = random.Random(run.id)
    kept = 1.0 if run.role == "dense" else _kept(run)
    skill = random.Random(run.arm).uniform(-0.02, 0.02)
    if value is None:
        value = 0.92 - 0.08 * (1 - kept) ** 3 + (skill + draw.gauss(0, 0.004) if run.role != "dense" else 0.0)
    measured = Measured(
        metrics={
            run.metric: Metric(value=value, low=value - 0.01, high=value + 0.01, n=10_000),
            "validation_accuracy": Metric(value=value, low=value - 0.01, high=value + 0.01, n=5_000),
        },
        dense_metric=0.92,
        before=DENSE,
        after=_after(run, kept),
        file_bytes=400_000,
        reached=None if run.role == "dense" else kept,
        sparsity=1 - kept,
        effective_sparsity=1 - kept,
        samples_scored=128,
        training=Training(steps=100, samples=12_800, macs=10**9),
        proof=1e-7 if run.granularity == "channel" else None,
        widths={"stem": (16, 8)} if run.granularity == "channel" else {},
        history=[{"step": 0.0, "validation": 0.5}, {"step": 100.0, "train_loss": 0.3, "validation": value}],
        weights="0" * 16,
    )
    return Record(
        schema=1,
        id=run.id,
        run=run,
        status="failed" if failed else "ok",
        measured=None if failed else measured,
        error=Failure(type="ValueError", message="made up", traceback="Traceback (made up)") if failed else None,
        machine=Machine(
            created="2026-01-01T00:00:00Z",
            seconds={"total": 10.0},
            peak_memory_bytes=500_000_000,
            latency=_latency(kept) if run.granularity == "channel" else {},
            environment={"processor": "made up", "cores": 2, "system": "Linux", "python": "3.11", "torch": "2.13"},
        ),
        code=code,
    )


def _kept(run: Run) -> float:
    ((kind, value),) = (run.budget or {"macs": 1.0}).items()
    return 1 - value if kind == "sparsity" else value


def _after(run: Run, kept: float) -> Size:
    left, physical = int(100_000 * kept), run.granularity == "channel"
    return Size(
        params=left if physical else 100_000,
        nonzero_params=left,
        macs=int(10_000_000 * kept) if physical else 10_000_000,
        effective_macs=int(10_000_000 * kept),
        bytes=int(400_000 * kept) if physical else 400_000,
    )


def _latency(kept: float) -> dict[str, Timing]:
    dense = Quantiles(p50_ms=4.0, p90_ms=4.4, n=50)
    pruned = Quantiles(p50_ms=1.0 + 3.0 * kept, p90_ms=1.2 + 3.0 * kept, n=50)
    return {"eager": Timing(engine="eager", threads=1, batch=1, dtype="float32", dense=dense, pruned=pruned)}
