"""``secateur inspect``: what can be cut, what cannot, and why."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from secateur.cli.common import JsonOption, call_for_model, console, inputs_for, print_json

if TYPE_CHECKING:
    from torch import nn

    from secateur.structure.structure import Structure

NETWORK_HELP = (
    "module:function, timm:NAME, torchvision:NAME, hf:FOLDER, hf:TYPE (hf:bert), or TASK/NETWORK (digits/vit)."
)


def command(
    model: Annotated[str, typer.Argument(help=NETWORK_HELP)],
    shape: Annotated[str | None, typer.Option(help="Shape of the input, for example 1,3,224,224.")] = None,
    example: Annotated[str | None, typer.Option(help="module:function that returns example inputs.")] = None,
    why: Annotated[str | None, typer.Option(help="Explain this tensor or axis: what it is tied to, and where.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a drawing of the network to this HTML file.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List every axis: do not fold repeated blocks.")] = False,
    safe_sparsity: Annotated[
        bool, typer.Option(help="Estimate instead how much may be pruned at random before signals are cut off.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="module:function that returns labelled batches, for --safe-sparsity.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the masks of --safe-sparsity.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show the axes of a network: role, size, members, shares of the cost; what is frozen and why."""
    from secateur.cli import explanation
    from secateur.errors import InvalidRecipe

    if safe_sparsity:
        from secateur.cli import signals

        if every or any(option is not None for option in (shape, example, why, report)):
            raise InvalidRecipe("--safe-sparsity takes --data, --seed and --json only: its inputs are the data's.")
        _check_named(model)
        signals.show(model, data, seed, as_json)
        return
    if data is not None:
        raise InvalidRecipe("Only --safe-sparsity looks at data: add it, or leave --data out.")
    network, inputs = _model_and_inputs(model, shape, example)
    structure, error = _analyzed(network, inputs)
    if report is not None:
        from secateur.measure.drawing import drawing_page

        drawing_page(structure, model, error).write(report)
    if why is not None:
        explanation.show(structure, why, as_json)
    elif as_json:
        print_json(_as_dict(structure, error))
    else:
        _show(structure, model, error, every)
    if report is not None and not as_json:
        console.print(f"\nWrote {report}.", markup=False)


def _model_and_inputs(model: str, shape: str | None, example: str | None) -> tuple[nn.Module, Any]:
    import torch

    from secateur.errors import InvalidRecipe
    from secateur.tasks import find_task

    _check_named(model)
    if ":" not in model:
        task_name, _, network = model.partition("/")
        if shape is not None or example is not None:
            raise InvalidRecipe(f"{model!r} has inputs of its own: leave --shape and --example out.")
        task = find_task(task_name)
        return task.build(network), torch.zeros(1, 1, task.size, task.size)
    made = call_for_model(model)
    return made, inputs_for(model, made, shape, example)


def _check_named(model: str) -> None:
    from secateur.errors import InvalidRecipe

    if ":" not in model and ("/" not in model or model.startswith(("/", "."))):
        raise InvalidRecipe(f"{model!r} is neither module:function nor TASK/NETWORK, such as digits/resnet8.")


def _analyzed(network: nn.Module, inputs: Any) -> tuple[Structure, float | None]:
    """Return the structure and the error of its proof; a network that is only a sketch (meta) cannot be proved."""
    from torch import Tensor
    from torch.utils._pytree import tree_map

    from secateur.structure.trace import trace

    if any(parameter.is_meta for parameter in network.parameters()):
        return trace(network, tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs)), None
    structure = trace(network, inputs)
    verification = structure.verify(network)
    while verification.failed:  # once as a rule; what is left is free only when nothing fails any more
        structure = structure.frozen(verification.failed)
        verification = structure.verify(network)
    return structure, verification.max_error


# ------------------------------------------------------------------------------------------------------------- tables


def _show(structure: Structure, model: str, error: float | None, every: bool) -> None:
    from secateur.measure.report import count
    from secateur.structure.explain import uncuttable

    inputs = ", ".join("x".join(map(str, tensor.shape)) for tensor in structure.inputs.tensors())
    params, lost = structure.params({}), uncuttable(structure)
    costs = f"{count(params)} parameters, {count(structure.macs({}))} MACs for an input of {inputs}"
    console.print(f"[bold]{escape(model)}[/]: {costs}", highlight=False)
    share = 100 * sum(lost.values()) / max(params, 1)
    where = f": {_some([f'{name} ({count(size)})' for name, size in lost.items()])}" if lost else ""
    console.print(f"{share:.2g} % of the parameters cannot be cut at all{where}.\n", highlight=False, markup=False)
    console.print(_axes_table(structure, every))
    _show_ties(structure)
    _show_branches(structure)
    console.print()
    console.print(_frozen_table(structure, every))
    if error is None:
        console.print("\nNot proved: the network is larger than this machine's memory, so it was only traced.")
    else:
        proof = f"\nProof: all free axes can be reordered and cut (largest relative error {error:.1e})."
        console.print(proof, highlight=False)


def _axes_table(structure: Structure, every: bool) -> Table:
    from secateur.structure.explain import Family, families, shares

    free = structure.prunable
    rows = [Family(axis.name, (axis,)) for axis in free] if every else families(free)
    table = Table(box=None, pad_edge=False)
    table.add_column("free axis", overflow="fold")
    table.add_column("role", no_wrap=True)
    for heading in ("units", "tensors", "MACs", "params"):
        table.add_column(heading, justify="right", no_wrap=True)
    room = max(console.width - OTHER_COLUMNS, 20)
    for row, share in zip(rows, shares(structure, [row.axes for row in rows]), strict=True):
        first, n = row.axes[0], len(row.axes)
        units = f"{n} x {first.size}" if n > 1 else str(first.size)
        cells = (broken(row.name, room), first.role, units, str(sum(len(axis.members) for axis in row.axes)))
        table.add_row(*map(escape, cells), f"{100 * share.macs:.1f} %", f"{100 * share.params:.1f} %")
    return table


OTHER_COLUMNS = 56
"""Width of the columns beside the name."""


def broken(name: str, width: int) -> str:
    """Return a dotted name in lines of at most `width` characters, if its parts allow that."""
    lines = [""]
    for part in re.findall(r"[^.\[]*[.]?|\[.*", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _show_ties(structure: Structure) -> None:
    from secateur.structure.explain import common_name, starred

    groups = defaultdict(list)
    for tie in structure.ties:
        words = [f"{name} ({structure.steps[name]} at a time)" if name in structure.steps else name for name in tie]
        groups[tuple(starred(word) for word in words)].append(words)
    for ties in groups.values():
        names = ", ".join(common_name(column) for column in zip(*ties, strict=True))
        times = f" ({len(ties)} times)" if len(ties) > 1 else ""
        console.print(f"Lose units together{times}: {names}", markup=False, highlight=False)


def _show_branches(structure: Structure) -> None:
    from secateur.cli.explanation import folded

    names = [branch.name for branch in structure.branches if branch.prunable]
    if names:
        branches = ", ".join(folded(names))
        console.print(f"Branches that can be dropped whole: {branches}", markup=False, highlight=False)


def _frozen_table(structure: Structure, every: bool) -> Table:
    from secateur.measure.report import short_reason
    from secateur.structure.explain import families

    table = Table(box=None, pad_edge=False)
    axes = [axis for axis in structure.axes if not axis.prunable]
    if every:
        table.add_column("frozen axis", overflow="fold")
        table.add_column("units", justify="right")
        table.add_column("why", overflow="fold")
        for axis in axes:
            table.add_row(escape(axis.name), str(axis.size), escape(axis.reason))
        return table
    table.add_column("frozen", justify="right")
    table.add_column("why", overflow="fold")
    table.add_column("for example", overflow="fold")
    groups = defaultdict(list)
    for axis in axes:
        groups[short_reason(axis.reason)].append(axis)
    for reason, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        table.add_row(str(len(members)), escape(reason), escape(_some([f.name for f in families(members)], 2)))
    return table


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --------------------------------------------------------------------------------------------------------------- JSON


def _as_dict(structure: Structure, error: float | None) -> dict[str, Any]:
    from secateur.structure.explain import expression, shares, uncuttable

    cost = shares(structure, [[axis] for axis in structure.axes])
    return {
        "axes": [
            {
                "name": axis.name,
                "role": axis.role,
                "size": axis.size,
                "members": [list(member) for member in axis.members],
                "prunable": axis.prunable,
                "reason": axis.reason,
                "macs_share": round(share.macs, 6),
                "params_share": round(share.params, 6),
            }
            for axis, share in zip(structure.axes, cost, strict=True)
        ],
        "tensors": {name: [expression(dim) for dim in dims] for name, dims in structure.tensors.items()},
        "ties": [{name: structure.steps.get(name, 1) for name in tie} for tie in structure.ties],
        "branches": [
            {"name": b.name, "macs": b.macs, "prunable": b.prunable, "reason": b.reason} for b in structure.branches
        ],
        "uncuttable": uncuttable(structure),
        "permutation_error": error,
        "macs": structure.macs({}),
        "params": structure.params({}),
    }
