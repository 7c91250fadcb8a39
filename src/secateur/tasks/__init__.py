"""Tasks: data, network, metric and training as named, versioned values."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from secateur.errors import UnknownName

if TYPE_CHECKING:
    from secateur.tasks.task import Task

TASKS = ("digits", "fashion-mnist", "imagefolder", "sentences")


def find_task(name: str) -> Task:
    """Return a task by name; its data are loaded when they are first used.

    Raises:
        UnknownName: No such task.
    """
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    task: Task = import_module(f"secateur.tasks.{name.replace('-', '_')}").TASK
    return task
