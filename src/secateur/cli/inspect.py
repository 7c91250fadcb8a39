"""``secateur inspect``: what can be cut, what cannot, and why."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secateur.cli.common import JsonOption, call_for_model, call_object, console, parse_shape, print_json

if TYPE_CHECKING:
    from secateur.structure.structure import Axis, Structure


def command(
    model: Annotated[str, typer.Argument(help="module:function that makes the network, or TASK/NETWORK (digits/vit).")],
    shape: Annotated[str | None, typer.Option(help="Shape of the input, for example 1,3,224,224.")] = None,
    example: Annotated[str | None, typer.Option(help="module:function that returns example inputs.")] = None,
    frozen: Annotated[bool, typer.Option(help="List every frozen axis, not only a count for each reason.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the axes of a network: name, size, members, share of the cost; what is frozen and why."""
    from secateur.structure.prove import proved_structure

    network, inputs = _model_and_inputs(model, shape, example)
    structure = proved_structure(network, inputs)
    verification = structure.verify(network)
    if as_json:
        print_json(_as_dict(structure, verification.max_error))
        return
    console.print(_axes_table(structure))
    for tie in structure.ties:
        names = (f"{name} ({structure.steps[name]} at a time)" if name in structure.steps else name for name in tie)
        console.print(f"Lose units together: {', '.join(names)}", markup=False)
    console.print()
    console.print(_frozen_table(structure, frozen))
    console.print(
        f"\nProof: permuting all free axes changes the output by {verification.max_error:.1e} (relative). "
        f"MACs {structure.macs({}):,}, parameters {structure.params({}):,}."
    )


def _model_and_inputs(model: str, shape: str | None, example: str | None) -> tuple[Any, Any]:
    import torch

    from secateur.errors import InvalidRecipe
    from secateur.tasks import find_task

    if ":" not in model and "/" in model:
        task_name, _, network = model.partition("/")
        if shape is not None or example is not None:
            raise InvalidRecipe(f"{model!r} has inputs of its own: leave --shape and --example out.")
        task = find_task(task_name)
        return task.build(network), torch.zeros(1, 1, task.size, task.size)
    if ":" not in model:
        raise InvalidRecipe(f"{model!r} is neither module:function nor TASK/NETWORK, such as digits/resnet8.")
    if (shape is None) == (example is None):
        raise InvalidRecipe("Give the input of the network: either --shape, or --example module:function.")
    return call_for_model(model), torch.zeros(parse_shape(shape)) if shape is not None else call_object(str(example))


def _share(structure: Structure, axis: Axis) -> float:
    """Return the fraction of the MACs that go away with the second half of the axis, relative to half."""
    total = structure.macs({})
    return 2 * (total - structure.macs({axis.name: axis.size // 2})) / total if total else 0.0


def _axes_table(structure: Structure) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("axis")
    table.add_column("units", justify="right")
    table.add_column("tensors", justify="right")
    table.add_column("share of MACs", justify="right")
    for axis in structure.prunable:
        row = (axis.name, str(axis.size), str(len(axis.members)), f"{100 * _share(structure, axis):.1f} %")
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table


def _frozen_table(structure: Structure, every: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    from secateur.measure.report import short_reason

    axes = [axis for axis in structure.axes if not axis.prunable]
    if every:
        table.add_column("frozen axis")
        table.add_column("reason", overflow="fold")
        for axis in axes:
            table.add_row(axis.name.replace("[", "\\["), axis.reason)
        return table
    table.add_column("frozen axes", justify="right")
    table.add_column("reason", overflow="fold")
    reasons = Counter(short_reason(axis.reason) for axis in axes)
    for reason, n in reasons.most_common():
        table.add_row(str(n), reason)
    return table


def _as_dict(structure: Structure, error: float) -> dict[str, Any]:
    return {
        "axes": [
            {
                "name": axis.name,
                "size": axis.size,
                "members": [list(member) for member in axis.members],
                "prunable": axis.prunable,
                "reason": axis.reason,
                "macs_share": round(_share(structure, axis), 6),
            }
            for axis in structure.axes
        ],
        "ties": [{name: structure.steps.get(name, 1) for name in tie} for tie in structure.ties],
        "permutation_error": error,
        "macs": structure.macs({}),
        "params": structure.params({}),
    }
