"""Processes on this machine, one thread each: two side by side beat one with two threads.

Every job has a process of its own, so whatever kills it costs nothing else. The processes are forked from one that has
PyTorch loaded already, which saves each of them seconds. They end when the runner dies, however it dies.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from time import monotonic

from secateur.bench.jobs import Ended, Workplace, attempt
from secateur.bench.records import Run
from secateur.core.hooks import TrainingState

_REPORT_SECONDS = 0.2
"""A job says at most so often how far it is."""


@dataclass
class _Job:
    run: Run
    process: BaseProcess
    connection: Connection
    fraction: float = 0.0
    ended: Ended | None = None


class LocalExecutor:
    """A pool of processes."""

    def __init__(self, place: Workplace, jobs: int, address: str | None = None) -> None:
        self.capacity = jobs
        self._place = place
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["secateur.bench.executors.local"])
        self._jobs: list[_Job] = []

    def submit(self, run: Run) -> None:
        """Start a job in a process of its own."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(run, self._place, theirs), name=run.label)
        process.start()
        theirs.close()
        self._jobs.append(_Job(run, process, ours))

    def wait(self, timeout: float) -> list[Ended]:
        """Return the jobs that ended."""
        wait([job.process.sentinel for job in self._jobs] + [job.connection for job in self._jobs], timeout)
        for job in self._jobs:
            _read(job)
        over = [job for job in self._jobs if not job.process.is_alive()]
        for job in over:
            _read(job)  # what it said between the first reading and its end
            job.process.join()
            job.connection.close()
        self._jobs = [job for job in self._jobs if job not in over]
        return [job.ended or _death_of(job) for job in over]

    def progress(self) -> dict[str, float]:
        """Return the finished fraction of the training of each job under way."""
        return {job.run.id: job.fraction for job in self._jobs}

    def close(self) -> None:
        """Kill what is under way."""
        for job in self._jobs:
            job.process.kill()
            job.process.join()


def _read(job: _Job) -> None:
    try:
        while job.connection.poll():
            said = job.connection.recv()
            if isinstance(said, Ended):
                job.ended = said
            else:
                job.fraction = said
    except (EOFError, OSError):  # the process is gone; whether it said its last word is known by now
        return


def _death_of(job: _Job) -> Ended:
    return Ended(job.run, "died", f"the process of {job.run.label} ended with code {job.process.exitcode}")


def _work(run: Run, place: Workplace, connection: Connection) -> None:
    """Run one job; called in its process."""
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    last = monotonic()

    def on_step(state: TrainingState) -> None:
        nonlocal last
        if monotonic() - last > _REPORT_SECONDS:
            last = monotonic()
            connection.send(state.step / state.last_step)

    connection.send(attempt(run, place, on_step))


def _end_with_the_runner() -> None:
    runner = multiprocessing.parent_process()
    assert runner is not None
    wait([runner.sentinel])
    os._exit(1)
