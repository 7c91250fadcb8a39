"""Work in processes of its own, and limits on its time.

Importing PyTorch and the model libraries takes longer than pruning most networks, so they are imported once and each
piece of work runs in a fork. Seconds are processor time of one thread, which other programs do not disturb.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

FORK = multiprocessing.get_context("fork")
HANGING = 3600
"""Seconds after which a process that computes nothing any more is ended."""


class OutOfTime(Exception):
    """Work was not done within its limit."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` if the block needs more seconds of processor time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime(f"not done in {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # again each second: some code swallows every exception
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def in_child(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what `work` returns in a fork of this process, and its peak memory; or ``crashed``, with the reason."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        if receiver.poll(HANGING):
            result: dict[str, Any] = receiver.recv()
            return result
        return {"crashed": f"still running after {HANGING} s"}
    except EOFError:
        process.join()
        return {"crashed": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        result = work(*arguments)
    except Exception as error:
        result = {"crashed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sender.send({**result, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024})
