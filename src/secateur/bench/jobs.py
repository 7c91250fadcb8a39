"""Runs one job: from what is to be run to its record on the disk."""

from __future__ import annotations

import fcntl
import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.api import prune, save
from secateur.bench.measurements import (
    Stopwatch,
    peak_memory,
    reached,
    share,
    timings,
    weights_hash,
)
from secateur.bench.plan import dense_run
from secateur.bench.records import (
    SCHEMA,
    Code,
    Failure,
    Machine,
    Measured,
    Metric,
    Part,
    Record,
    Reported,
    Run,
    Size,
    Timing,
    Training,
)
from secateur.bench.store import Store
from secateur.core.budget import Budget
from secateur.core.recipe import Recipe
from secateur.deploy import safetensors
from secateur.environment import commit, environment
from secateur.errors import InvalidFile, MissingCheckpoint
from secateur.measure.profile import profile
from secateur.parts.recovery.fine_tune import FineTune
from secateur.pruned import Pruned
from secateur.tasks import find_task
from secateur.tasks.reference import early_states, load_reference, reference_path, save_reference, train_reference
from secateur.tasks.task import Task
from secateur.training.loop import History, OnStep

NOT_THE_METHODS_FAULT = (OSError, MemoryError, ImportError, InvalidFile)
"""A full disk, missing data or a missing package say nothing about a method: no record, the job is still to be done."""


class Workplace(Part):
    """Where jobs work, and what they measure that is no part of the result.

    Attributes:
        results: Folder of the records.
        scratch: Folder of the dense references, and of the networks if they are kept.
        engines: In which compact networks are timed.
        reported: Figures of papers that belong beside the results.
        keep_networks: Whether pruned networks stay in the scratch folder.
    """

    results: Path
    scratch: Path
    engines: tuple[str, ...] = ("eager",)
    reported: tuple[Reported, ...] = ()
    keep_networks: bool = False

    def network(self, run: Run) -> Path:
        """Return where the network of a run lies: one place for all benchmarks that train a dense network alike."""
        name = run.work if run.role == "dense" else run.id
        return self.scratch / "networks" / f"{name}.safetensors"


@dataclass(frozen=True)
class Ended:
    """A job that ended.

    Attributes:
        run: What was run.
        problem: None if its record is on the disk; ``died`` if its process is gone; ``halt`` if nothing can be run
            (a full disk, missing data).
        message: What the problem is.
    """

    run: Run
    problem: Literal["died", "halt"] | None = None
    message: str = ""


def attempt(run: Run, place: Workplace, on_step: OnStep | None = None) -> Ended:
    """Run one job on one thread, so that figures do not depend on the machine, and return how it ended."""
    torch.set_num_threads(1)
    try:
        run_job(run, place, on_step)
    except NOT_THE_METHODS_FAULT as error:
        return Ended(run, "halt", f"{type(error).__name__}: {error}")
    return Ended(run)


def run_job(run: Run, place: Workplace, on_step: OnStep | None = None) -> Record:
    """Run one job, write its record and return it; a method that fails gives a record that says why.

    Raises:
        OSError: A full disk and the like; no record is written.
    """
    watch = Stopwatch()
    own = _own_code()
    latency: dict[str, Timing] = {}
    measured = error = None
    (place.scratch / "networks").mkdir(parents=True, exist_ok=True)
    try:
        work = _measure_dense if run.role == "dense" else _measure_pruned
        measured, latency = work(run, place, watch, on_step)
    except NOT_THE_METHODS_FAULT:
        raise
    except Exception as caught:
        text = "".join(traceback.format_exception(caught))
        error = Failure(type=type(caught).__name__, message=str(caught), traceback=text)
    record = Record(
        schema=SCHEMA,
        id=run.id,
        run=run,
        status="ok" if measured else "failed",
        measured=measured,
        error=error,
        reported=tuple(r for r in place.reported if r.is_about(run)),
        machine=Machine(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=watch.seconds(),
            peak_memory_bytes=peak_memory(),
            latency=latency,
            environment=environment(),
        ),
        code=_code(own, run, place),
    )
    return Store(place.results).publish(record)


def reference(run: Run, place: Workplace, on_step: OnStep | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return the dense network that a run starts from, in eval mode, and the facts about its training.

    It is trained by whoever comes first; others wait for it. A training that was interrupted goes on where it was.
    """
    task, dense = find_task(run.task), dense_run(run)
    if task.digest is None and task.splits.digest() != run.data:
        raise InvalidFile(f"The data of task {run.task!r} have changed since {run.label} was planned.")
    if run.reference == "packaged":
        facts = json.loads(reference_path(task, run.network).with_suffix(".json").read_text(encoding="utf-8"))
        return load_reference(task, run.network), facts
    path = place.network(dense)
    told = path.with_suffix(".json")  # written last: if it is there, the network is whole
    with _alone(path.with_suffix(".lock")):
        if not told.is_file():
            checkpoint = path.with_suffix(".checkpoint")
            if run.reference == "pretrained":
                model, facts = _pretrained(run, task)
            else:
                settings = FineTune.parse(run.training)
                model, facts = train_reference(
                    task, run.network, seed=run.seed, settings=settings, checkpoint=checkpoint, on_step=on_step
                )
            save_reference(model, {**facts, "code": _own_code().model_dump()}, path)
            checkpoint.unlink(missing_ok=True)
    facts = json.loads(told.read_text(encoding="utf-8"))
    return safetensors.read(path, lambda: task.build(run.network)), facts


def _pretrained(run: Run, task: Task) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network with the weights that its library brings, measured as it is."""
    model = task.pretrained(run.network).eval()
    facts = {"test_accuracy": task.test_accuracy(model), "validation_accuracy": task.validation_accuracy(model)}
    return model, {**facts, "history": []}


# -------------------------------------------------------------------------------------------------- measurements


def _measure_dense(
    run: Run, place: Workplace, watch: Stopwatch, on_step: OnStep | None
) -> tuple[Measured, dict[str, Timing]]:
    task = find_task(run.task)
    with watch("training"):
        model, facts = reference(run, place, on_step)
    metrics = _metrics(run, task, facts["test_accuracy"], facts["validation_accuracy"])
    size = Size(**profile(model, task.example()).as_dict())
    measured = Measured(
        metrics=metrics,
        dense_metric=metrics[run.metric].value,
        before=size,
        after=size,
        file_bytes=_file_bytes(run, place, task),
        reached=None,
        sparsity=0.0,
        effective_sparsity=0.0,
        samples_scored=0,
        training=_training(task, facts["history"], size.macs),
        proof=None,
        widths={},
        history=facts["history"],
        weights=weights_hash(model),
    )
    return measured, {}


def _measure_pruned(
    run: Run, place: Workplace, watch: Stopwatch, on_step: OnStep | None
) -> tuple[Measured, dict[str, Timing]]:
    task = find_task(run.task)
    with watch("reference"):
        dense, facts = reference(run, place, on_step)
    with watch("pruning and recovery"):
        pruned = _prune(run, task, dense, facts, on_step)
    with watch("evaluation"):
        metrics = _metrics(run, task, task.test_accuracy(pruned.model), task.validation_accuracy(pruned.model))
    with watch("writing"):
        path = place.network(run)
        save(pruned, path)
        file_bytes = path.stat().st_size
        if not place.keep_networks:
            path.unlink()
    with watch("latency"):
        latency = timings(dense, pruned, place.engines) if pruned.structure_plan.smaller else {}
    after = Size(**pruned.after.as_dict())
    plan = pruned.structure_plan
    measured = Measured(
        metrics=metrics,
        dense_metric=facts["test_accuracy"],
        before=Size(**pruned.before.as_dict()),
        after=after,
        file_bytes=file_bytes,
        reached=reached(pruned),
        sparsity=1 - after.nonzero_params / pruned.before.params,
        effective_sparsity=pruned.effective_sparsity,
        samples_scored=sum(r.samples_used for r in pruned.rounds),
        training=_training(task, pruned.history, after.macs),
        proof=max((proof.max_error for proof in pruned.proofs), default=None),
        widths={name: (axis.size, len(axis.kept)) for name, axis in plan.axes.items()},
        history=pruned.history,
        weights=weights_hash(pruned.model),
    )
    return measured, latency


def _prune(run: Run, task: Task, dense: nn.Module, facts: dict[str, Any], on_step: OnStep | None) -> Pruned:
    assert run.recipe is not None and run.budget is not None
    recipe = Recipe(**run.recipe)
    return prune(
        dense,
        task.example(),
        method=recipe,
        budget=Budget(**run.budget),
        data=task.train_batches(run.seed),
        calibration=list(islice(task.train_batches(run.seed), run.calibration)),
        validation=task.validation_batches(),
        loss=task.loss,
        checkpoints=_early_states(run, task, recipe, facts),
        on_step=on_step,
        precision=task.precision,
        seed=run.seed,
    )


def _early_states(run: Run, task: Task, recipe: Recipe, facts: dict[str, Any]) -> dict[str | int, dict[str, Tensor]]:
    """Return the weights that the dense reference had at the moments that the recipe names."""
    wanted = recipe.checkpoints
    if wanted and run.reference == "pretrained":
        raise MissingCheckpoint(
            f"Nobody knows the weights that the pretrained {run.network!r} had at {wanted.pop()!r}."
        )
    return early_states(task, run.network, recipe, {"seed": run.seed, **facts})


def _metrics(run: Run, task: Task, test: float, validation: float) -> dict[str, Metric]:
    return {
        run.metric: share(test, len(task.splits.test.targets)),
        "validation_accuracy": share(validation, len(task.splits.validation.targets)),
    }


def _training(task: Task, history: History, macs: int) -> Training:
    steps = int(history[-1]["step"]) if history else 0
    epochs = steps / len(task.train_batches())
    samples = round(epochs * len(task.splits.train.targets))
    return Training(steps=steps, samples=samples, macs=samples * macs)


def _file_bytes(run: Run, place: Workplace, task: Task) -> int:
    packaged = run.reference == "packaged"
    return (reference_path(task, run.network) if packaged else place.network(run)).stat().st_size


# --------------------------------------------------------------------------------------------------------- facts


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process at a time do what follows; the lock of a process that dies is gone with it."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _own_code() -> Code:
    head, clean = commit()
    return Code(version=__version__, commit=head, clean=clean)


def _code(own: Code, run: Run, place: Workplace) -> Code:
    """Return which code made a run: for a dense reference the one that trained it; clean only if that was clean too."""
    told = place.network(dense_run(run)).with_suffix(".json")
    if run.reference == "packaged" or not told.is_file():
        return own
    theirs = Code(**json.loads(told.read_text(encoding="utf-8"))["code"])
    return theirs if run.role == "dense" else own.model_copy(update={"clean": own.clean and theirs.clean})
