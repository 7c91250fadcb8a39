"""Where jobs run: processes here, a Ray cluster, or SLURM. Each executor only starts jobs and says when they ended."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from secateur.bench.jobs import Ended, Workplace
from secateur.bench.records import Run
from secateur.errors import UnknownName


class Executor(Protocol):
    """Starts jobs. All of them write their records into one folder, which must be shared.

    Attributes:
        capacity: How many jobs may be under way at once.
    """

    capacity: int

    def submit(self, run: Run) -> None:
        """Start a job."""

    def wait(self, timeout: float) -> list[Ended]:
        """Return the jobs that ended since the last call, after at most `timeout` seconds."""

    def progress(self) -> dict[str, float]:
        """Return the finished fraction of the jobs under way, by run id, as far as it is known."""

    def close(self) -> None:
        """End the jobs that are still under way."""


_EXECUTORS = {"local": "LocalExecutor", "ray": "RayExecutor", "slurm": "SlurmExecutor"}


def make_executor(name: str, place: Workplace, jobs: int, address: str | None = None) -> Executor:
    """Return an executor.

    Args:
        name: ``local``, ``ray`` or ``slurm``.
        place: Where jobs work.
        jobs: How many run side by side.
        address: Of a Ray cluster; default: one on this machine.

    Raises:
        UnknownName: No such executor.
        MissingDependency: Its package is not installed.
    """
    if name not in _EXECUTORS:
        raise UnknownName("executor", name, _EXECUTORS)
    make: Callable[..., Any] = getattr(import_module(f"{__name__}.{name}"), _EXECUTORS[name])
    executor: Executor = make(place, jobs, address)
    return executor
