"""What several commands share: progress bars, JSON, and objects named ``module:function``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secateur.errors import InvalidRecipe

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.hooks import TrainingState

console = Console()
messages = Console(stderr=True)
"""Progress and remarks; results alone go to standard output."""

ResultsOption = Annotated[Path, typer.Option(help="Folder of the records.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_json(data: Any) -> None:
    """Print plain data as JSON."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


def progress_bar() -> Progress:
    """Return a progress bar on standard error."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=messages,
        transient=True,
    )


@contextmanager
def training_progress(description: str) -> Iterator[Callable[[TrainingState], None]]:
    """Show the steps of a training run; yields what to pass as ``on_step``."""
    with progress_bar() as progress:
        bar = progress.add_task(description, total=None, note="")

        def on_step(state: TrainingState) -> None:
            progress.update(bar, total=state.last_step, completed=state.step, note=f"loss {state.loss:.3f}")

        yield on_step


def import_object(reference: str) -> Any:
    """Return the object that ``module:name`` names; modules in the working directory are found too.

    Raises:
        InvalidRecipe: The module or the name does not exist.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not name:
        raise InvalidRecipe(f"{reference!r} must have the form module:function, for example networks:make_model.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InvalidRecipe(
            f"Cannot import the module of {reference!r}: {error}. Run from the folder that holds it."
        ) from error
    if not hasattr(module, name):
        raise InvalidRecipe(f"The module {module_name!r} has no {name!r}. It has: {', '.join(_public(module)[:8])}.")
    return getattr(module, name)


def call_object(reference: str) -> Any:
    """Return what the function ``module:function`` returns.

    Raises:
        InvalidRecipe: It fails, or returns nothing.
    """
    function = import_function(reference)
    try:
        result = function()
    except Exception as error:
        raise InvalidRecipe(
            f"{reference!r} failed when called without arguments: {type(error).__name__}: {error}"
        ) from error
    if result is None:
        raise InvalidRecipe(f"{reference!r} returned None. Does it lack a return statement?")
    return result


def call_for_model(reference: str) -> nn.Module:
    """Return the network that the function ``module:function`` makes, or one of a library (``timm:resnet50``).

    Raises:
        InvalidRecipe: It fails, or returns something else.
    """
    from secateur.tasks import zoo

    if zoo.is_in_zoo(reference):
        return zoo.build(reference)
    model = call_object(reference)
    if not hasattr(model, "named_parameters"):
        raise InvalidRecipe(f"{reference!r} must return a torch.nn.Module; it returned {type(model).__name__}.")
    return cast("nn.Module", model)


def data_of(reference: str | None) -> tuple[Any, Any]:
    """Return training and validation batches from the function ``module:function``; None for what there is not.

    Raises:
        InvalidRecipe: It fails, or returns nothing.
    """
    data = call_object(reference) if reference is not None else None
    return data if isinstance(data, tuple) and len(data) == 2 else (data, None)


def inputs_for(reference: str, model: nn.Module, shape: str | None, example: str | None) -> Any:
    """Return example inputs for a network from `call_for_model`.

    Args:
        reference: What made the network.
        model: The network.
        shape: Of the input, in words.
        example: ``module:function`` that returns the inputs.

    Raises:
        InvalidRecipe: Both are given, or neither for a network that has no inputs of its own.
    """
    import torch

    from secateur.tasks import zoo

    sizes = parse_shape(shape) if shape is not None else None
    if zoo.is_in_zoo(reference) and example is None:
        return zoo.example_inputs(reference, model, sizes)
    if (sizes is None) == (example is None):
        raise InvalidRecipe("Give the input of the network: either --shape, or --example module:function.")
    return torch.zeros(sizes) if sizes is not None else call_object(str(example))


def import_function(reference: str) -> Callable[..., Any]:
    """Return the function that ``module:name`` names.

    Raises:
        InvalidRecipe: It does not exist, or is not a function.
    """
    function = import_object(reference)
    if not callable(function):
        raise InvalidRecipe(f"{reference!r} is not a function.")
    return cast("Callable[..., Any]", function)


def check_folder(path: Path) -> None:
    """Refuse a place where no folder for results can be made, before any work is done.

    Raises:
        InvalidRecipe: It is a file, or lies in a place that cannot be written to.
    """
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InvalidRecipe(f"Cannot make the folder {path}: {existing} is a file, or cannot be written to.")


def parse_shape(text: str) -> tuple[int, ...]:
    """Return the shape in ``1,3,224,224`` or ``1x3x224x224``.

    Raises:
        InvalidRecipe: It is not one.
    """
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise InvalidRecipe(f"{text!r} is not a shape; write for example 1,3,224,224.") from error
    if not shape or min(shape) < 1:
        raise InvalidRecipe(f"{text!r} is not a shape: every size must be at least 1.")
    return shape


def _public(module: Any) -> list[str]:
    return sorted(name for name in vars(module) if not name.startswith("_"))
