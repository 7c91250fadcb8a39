"""A Ray cluster: Ray starts a job again when its worker dies."""

from __future__ import annotations

from typing import Any

from secateur.bench.jobs import Ended, Workplace, attempt
from secateur.bench.records import Run
from secateur.optional import optional_import

RETRIES = 3
"""How often Ray starts a job again whose worker died."""


class RayExecutor:
    """Jobs of one processor each.

    Args:
        place: Folders that all machines of the cluster share.
        jobs: How many are under way at once; what the cluster has no processor for waits there.
        address: Of the cluster; None starts one on this machine with `jobs` processors.
    """

    def __init__(self, place: Workplace, jobs: int, address: str | None = None) -> None:
        self.capacity = jobs
        self._place = place
        self._ray: Any = optional_import("ray", "ray")
        here = {} if address else {"num_cpus": jobs, "include_dashboard": False}
        self._ray.init(address=address, log_to_driver=False, configure_logging=False, **here)
        self._remote = self._ray.remote(num_cpus=1, max_retries=RETRIES)(attempt)
        self._jobs: dict[Any, Run] = {}

    def submit(self, run: Run) -> None:
        """Hand a job to the cluster."""
        self._jobs[self._remote.remote(run, self._place)] = run

    def wait(self, timeout: float) -> list[Ended]:
        """Return the jobs that ended."""
        if not self._jobs:
            return []
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=timeout)
        return [self._result(reference, self._jobs.pop(reference)) for reference in ready]

    def _result(self, reference: Any, run: Run) -> Ended:
        try:
            ended: Ended = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return Ended(run, "died", f"{run.label}: {str(error).splitlines()[0]}")
        return ended

    def progress(self) -> dict[str, float]:
        """Return the jobs under way; how far they are is not known."""
        return {run.id: 0.0 for run in self._jobs.values()}

    def close(self) -> None:
        """Cancel what is under way and leave the cluster."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()
