"""The demo: one trained network, pruned, beside random pruning and beside the small architecture from scratch."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from queue import Empty, Queue
from time import perf_counter
from typing import Any

import torch
from torch import nn

from secateur.api import load, prune, save
from secateur.atomic import written_atomically
from secateur.bench.statistics import interval
from secateur.core.budget import Budget
from secateur.core.hooks import TrainingState
from secateur.core.method import method
from secateur.core.randomness import seed_for
from secateur.core.recipe import Recipe
from secateur.core.units import draw_fresh
from secateur.deploy import onnx, safetensors
from secateur.environment import environment
from secateur.measure.latency import available_engines, compare_latency
from secateur.measure.profile import profile
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks import find_task
from secateur.tasks.reference import load_reference, reference_path
from secateur.tasks.task import Task
from secateur.training.loop import OnStep, Trainer

OnProgress = Callable[[str, int, int], None]
"""Called with (what runs, steps done, steps in all)."""

BUDGET = 0.3
"""Kept fraction of the MACs in the table; the other budgets are for the plot."""

ARMS = ("taylor", "random", "scratch")
CALIBRATION_BATCHES = 30
"""As many as Molchanov et al. take."""

PROCESSES = 2
"""One thread each: on two cores this beats one process with two threads."""


@dataclass(frozen=True)
class Settings:
    """How a task is shown.

    Attributes:
        slots: The recipe's slots for all methods alike.
        other_budgets: Kept fractions of the MACs for further points of the plot, one seed each.
        scratch: Training of the small architecture from scratch: as many epochs as the dense network had (Scratch-E).
    """

    slots: Mapping[str, Any]
    other_budgets: tuple[float, ...]
    scratch: FineTune


@dataclass(frozen=True)
class Job:
    """One run of the demo, in a process of its own."""

    task: str
    arm: str
    macs: float
    seed: int
    file: str
    source: str = ""
    """For scratch: the file whose architecture is trained."""


@dataclass
class Outcome:
    """What one job found."""

    job: Job
    test_accuracy: float
    profile: dict[str, int]
    history: list[dict[str, float]]
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    proof: float = 0.0


SETTINGS = {
    "digits": Settings(
        slots={
            "granularity": {"name": "channel", "round_to": 8},
            "allocation": {"name": "global", "normalize": "mean"},
            "schedule": "one-shot",
            "recovery": {"name": "fine-tune", "epochs": 2, "lr": 0.02},
        },
        other_budgets=(0.6, 0.15),
        scratch=FineTune(epochs=20, lr=0.05, weight_decay=5e-4, warmup=0.05),
    ),
    "fashion-mnist": Settings(
        slots={
            "granularity": {"name": "channel", "round_to": 8},
            "allocation": {"name": "global", "normalize": "mean"},
            "schedule": "one-shot",
            "recovery": {"name": "fine-tune", "epochs": 2, "lr": 0.02},
        },
        other_budgets=(),
        scratch=FineTune(epochs=20, lr=0.2, weight_decay=5e-4, warmup=0.15),
    ),
}


def run_demo(task_name: str, out: Path, seeds: int, on_progress: OnProgress) -> dict[str, Any]:
    """Run all jobs, measure the networks, write the files, and return the record.

    Args:
        task_name: ``digits`` or ``fashion-mnist``.
        out: Folder for the networks, the record and the report; made if it does not exist.
        seeds: Number of seeds of each row of the table.
        on_progress: Called now and then.
    """
    start = perf_counter()
    task, settings = find_task(task_name), SETTINGS[task_name]
    dense = load_reference(task)
    example = task.example()  # fails early and clearly if the data are not there
    (out / "runs").mkdir(parents=True, exist_ok=True)
    outcomes = _run_jobs(_jobs(task, settings, seeds, out / "runs"), on_progress)
    shutil.copyfile(_first(outcomes, "taylor").job.file, out / "taylor.safetensors")
    networks = {"dense": dense} | {arm: load(_first(outcomes, arm).job.file, task.build) for arm in ARMS}
    onnx.export(networks["taylor"], example, out / "taylor.onnx")
    rows = {"dense": _dense_row(task, dense)} | {arm: _row(outcomes, arm) for arm in ARMS}
    for engine in available_engines():
        on_progress(f"measuring latency in {engine}", 1, 1)
        for name, latency in compare_latency(networks, example, engine).items():
            rows[name]["latency"][engine] = latency.as_dict()
    record = {
        "schema": 1,
        "kind": "demo",
        "task": {"name": task.name, "version": task.version, "data": task.digest, "network": task.default_network},
        "budget": Budget(macs=BUDGET).model_dump(exclude_none=True),
        "recipes": {a: {"hash": r.hash, **r.model_dump(mode="json")} for a, r in _recipes(settings).items()},
        "scratch": settings.scratch.model_dump(mode="json"),
        "rows": rows,
        "runs": [_run_record(outcome) for outcome in outcomes],
        "environment": environment(),
        "seconds": round(perf_counter() - start, 1),
    }
    with written_atomically(out / "record.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


# -------------------------------------------------------------------------------------------------------- jobs


def _recipes(settings: Settings) -> dict[str, Recipe]:
    return {arm: method(arm).but(**settings.slots) for arm in ("taylor", "random")}


def _jobs(task: Task, settings: Settings, seeds: int, folder: Path) -> list[Job]:
    """Return all jobs: the table's first, so that the scratch runs can start early."""

    def job(arm: str, macs: float, seed: int) -> Job:
        source = str(folder / f"taylor-{macs:g}-{seed}.safetensors") if arm == "scratch" else ""
        return Job(task.name, arm, macs, seed, str(folder / f"{arm}-{macs:g}-{seed}.safetensors"), source)

    table = [job(arm, BUDGET, seed) for arm in ARMS for seed in range(seeds)]
    return table + [job(arm, macs, 0) for macs in settings.other_budgets for arm in ("taylor", "random")]


def _run_jobs(jobs: list[Job], on_progress: OnProgress) -> list[Outcome]:
    """Run jobs in processes of one thread each, a scratch job after the run whose architecture it takes."""
    context = multiprocessing.get_context("spawn")
    outcomes: list[Outcome] = []
    waiting = list(jobs)
    running: dict[Future[Outcome], Job] = {}
    steps: dict[str, float] = {}
    with context.Manager() as manager, ProcessPoolExecutor(PROCESSES, context, torch.set_num_threads, (1,)) as pool:
        queue = manager.Queue()
        while waiting or running:
            written = {outcome.job.file for outcome in outcomes}
            ready = [job for job in waiting if not job.source or job.source in written]
            for job in ready[: PROCESSES - len(running)]:
                running[pool.submit(_run_job, job, queue)] = job
                waiting.remove(job)
            finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            outcomes += [future.result() for future in finished]
            running = {future: job for future, job in running.items() if future not in finished}
            _drain(queue, steps)
            names = " and ".join(f"{job.arm} (seed {job.seed})" for job in running.values())
            on_progress(names, int(100 * sum(steps.values())), 100 * len(jobs))
    return sorted(outcomes, key=lambda outcome: jobs.index(outcome.job))


def _drain(queue: Queue[tuple[str, float]], steps: dict[str, float]) -> None:
    """Take what the workers have reported: the finished fraction of each job."""
    while True:
        try:
            name, fraction = queue.get_nowait()
        except Empty:
            return
        steps[name] = fraction


def _run_job(job: Job, queue: Queue[tuple[str, float]]) -> Outcome:
    """Run one job; called in a worker process."""
    task, settings = find_task(job.task), SETTINGS[job.task]

    def on_step(state: TrainingState) -> None:
        queue.put((job.file, state.step / state.last_step))

    outcome = _scratch(job, task, settings, on_step) if job.source else _prune(job, task, settings, on_step)
    queue.put((job.file, 1.0))
    return outcome


def _prune(job: Job, task: Task, settings: Settings, on_step: OnStep) -> Outcome:
    pruned = prune(
        load_reference(task),
        task.example(),
        method=_recipes(settings)[job.arm],
        budget=Budget(macs=job.macs),
        data=task.train_batches(job.seed),
        calibration=list(islice(task.train_batches(job.seed), CALIBRATION_BATCHES)),
        validation=task.validation_batches(),
        loss=task.loss,
        precision=task.precision,
        seed=job.seed,
        on_step=on_step,
    )
    save(pruned, job.file)
    structure, plan = pruned.structure, pruned.structure_plan
    assert structure is not None
    return Outcome(
        job,
        task.test_accuracy(pruned.model),
        pruned.after.as_dict(),
        pruned.history,
        widths={
            axis.name: (axis.size, len(plan.axes[axis.name].kept) if axis.name in plan.axes else axis.size)
            for axis in structure.prunable
        },
        frozen={axis.name: axis.reason for axis in structure.axes if not axis.prunable},
        proof=pruned.proofs[-1].max_error,
    )


def _scratch(job: Job, task: Task, settings: Settings, on_step: OnStep) -> Outcome:
    """Train the architecture that Taylor pruning found with weights drawn anew."""
    torch.manual_seed(seed_for("weights", job.seed))
    model = load(job.source, task.build)
    draw_fresh(model)
    data = task.train_batches(job.seed)
    trainer = Trainer(model, settings.scratch, loss=task.loss, precision=task.precision)
    last = round(settings.scratch.epochs * len(data))
    history = trainer.run(data, 0, last, evaluate=task.validation_accuracy, on_step=on_step)
    safetensors.write(job.file, model, safetensors.read_plan(job.source))
    return Outcome(job, task.test_accuracy(model), profile(model, task.example()).as_dict(), history)


# -------------------------------------------------------------------------------------------------------- rows


def _first(outcomes: list[Outcome], arm: str) -> Outcome:
    return next(o for o in outcomes if o.job.arm == arm and o.job.macs == BUDGET)


def _row(outcomes: list[Outcome], arm: str) -> dict[str, Any]:
    runs = [o for o in outcomes if o.job.arm == arm and o.job.macs == BUDGET]
    accuracy = interval([o.test_accuracy for o in runs])
    return {
        "test_accuracy": {"mean": accuracy.mean, "half_width": accuracy.half_width, "n": accuracy.n},
        "profile": runs[0].profile,
        "file_bytes": Path(runs[0].job.file).stat().st_size,
        "latency": {},
    }


def _dense_row(task: Task, dense: nn.Module) -> dict[str, Any]:
    return {
        "test_accuracy": {"mean": task.test_accuracy(dense), "half_width": 0.0, "n": 1},
        "profile": profile(dense, task.example()).as_dict(),
        "file_bytes": reference_path(task, task.default_network).stat().st_size,
        "latency": {},
    }


def _run_record(outcome: Outcome) -> dict[str, Any]:
    fields = {key: value for key, value in asdict(outcome).items() if key != "job"}
    return {"arm": outcome.job.arm, "budget_macs": outcome.job.macs, "seed": outcome.job.seed, **fields}
