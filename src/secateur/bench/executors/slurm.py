"""SLURM, through submitit: one job of one processor per run."""

from __future__ import annotations

from time import monotonic, sleep
from typing import Any

from secateur.bench.jobs import Ended, Workplace, attempt
from secateur.bench.records import Run
from secateur.optional import optional_import

_POLL_SECONDS = 0.5
_MINUTES = 24 * 60


class SlurmExecutor:
    """Jobs in SLURM's queue.

    Args:
        place: Folders that all nodes share; submitit's logs go to ``slurm`` below the scratch folder.
        jobs: How many are queued or running at once.
        address: The kind of cluster in submitit's words; default: SLURM. ``local`` runs processes here.
    """

    def __init__(self, place: Workplace, jobs: int, address: str | None = None) -> None:
        self.capacity = jobs
        self._place = place
        submitit: Any = optional_import("submitit", "slurm")
        self._queue = submitit.AutoExecutor(folder=place.scratch / "slurm", cluster=address or "slurm")
        self._queue.update_parameters(name="secateur", cpus_per_task=1, timeout_min=_MINUTES)
        self._jobs: list[tuple[Run, Any]] = []

    def submit(self, run: Run) -> None:
        """Queue a job."""
        self._jobs.append((run, self._queue.submit(attempt, run, self._place)))

    def wait(self, timeout: float) -> list[Ended]:
        """Return the jobs that ended."""
        end = monotonic() + timeout
        while not any(job.done() for _, job in self._jobs) and monotonic() < end:
            sleep(min(_POLL_SECONDS, timeout))
        over = [(run, job) for run, job in self._jobs if job.done()]
        self._jobs = [(run, job) for run, job in self._jobs if (run, job) not in over]
        return [self._result(run, job) for run, job in over]

    def _result(self, run: Run, job: Any) -> Ended:
        error = job.exception()
        if error is not None:
            return Ended(run, "died", f"{run.label}: {str(error).splitlines()[0]}")
        ended: Ended = job.result()
        return ended

    def progress(self) -> dict[str, float]:
        """Return the jobs queued or running; how far they are is not known."""
        return {run.id: 0.0 for run, _ in self._jobs}

    def close(self) -> None:
        """Cancel what is queued or running."""
        for _, job in self._jobs:
            job.cancel()
