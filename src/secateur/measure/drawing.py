"""A drawing of a network as axes and the layers that write and read them, for people.

Layers stand in the order of execution; an axis is a lane that runs from its first tensor to its last. Repeated blocks
are drawn once. This module says what there is to draw; the template lays it out in the browser.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from secateur.measure.figures import templates
from secateur.measure.report import Page, Section, Tile, count, frozen_section
from secateur.structure.dims import Dim, flat, leaves
from secateur.structure.explain import common_name, explain_axis, shares, starred, uncuttable, varying_numbers
from secateur.structure.roles import ROLES
from secateur.structure.structure import Axis, Structure

TIMES = "\N{MULTIPLICATION SIGN}"
LONGEST_PERIOD = 60
"""Most layers that one repeated block may have."""

DRAWING_TEXT = (
    "Layers from top to bottom as they run. A lane is an axis: slices of tensors that live and die together. "
    "Hover or tap a lane or a size to see all that it runs through."
)


def drawing_page(structure: Structure, name: str, error: float | None) -> Page:
    """Return a page with the drawing of a network.

    Args:
        structure: What `trace` found.
        name: What to call the network.
        error: The largest relative error of the proof; None if there is no proof.
    """
    params, lost = structure.params({}), sum(uncuttable(structure).values())
    tiles = [
        Tile(count(params), "parameters"),
        Tile(count(structure.macs({})), "MACs"),
        Tile(str(len(structure.prunable)), "axes that can be cut"),
        Tile(f"{100 * lost / max(params, 1):.2g} %", "of the parameters cannot be cut at all"),
    ]
    proof = (
        "It was not proved."
        if error is None
        else f"All free axes can be reordered and cut (largest relative error {error:.0e})."
    )
    inputs = ", ".join(" x ".join(map(str, tensor.shape)) for tensor in structure.inputs.tensors())
    return Page(
        title=f"secateur: {name}",
        headline=f"What can be cut from {name}",
        subtitle=f"Traced with an input of {inputs}. {proof}",
        tiles=tiles,
        sections=[drawing_section(structure), frozen_section(structure)],
    )


def drawing_section(structure: Structure) -> Section:
    """Return the section with the drawing."""
    figure = templates().get_template("drawing.html.j2").render(data=drawing_data(structure), roles=ROLES)
    return Section("Layers and axes", text=DRAWING_TEXT, figure=figure)


def drawing_data(structure: Structure) -> dict[str, Any]:
    """Return what is drawn, as plain data: axes, rows (one per layer), and runs of rows that repeat."""
    number = {axis.leaf: i for i, axis in enumerate(structure.axes)}
    rows = [_row(structure, module, names, number) for module, names in _layers(structure).items()]
    cost = shares(structure, [[axis] for axis in structure.axes])
    runs = repeats([_alike(row, structure.axes) for row in rows], [row["name"] for row in rows])
    return {
        "axes": [
            {**_axis(structure, axis), "macs": share.macs, "params": share.params}
            for axis, share in zip(structure.axes, cost, strict=True)
        ],
        "rows": rows,
        "repeats": [_repeat(rows, run) for run in runs],
    }


def _axis(structure: Structure, axis: Axis) -> dict[str, Any]:
    first, dim = axis.members[0]
    tied = [[m.tensor, m.dim, str(m.place or "")] for m in explain_axis(structure, axis)]
    reasons = axis.reason.split("; ") if axis.reason else []
    return {
        "name": axis.name,
        "role": axis.role,
        "size": axis.size,
        "reasons": reasons,
        "members": [[first, dim, ""], *tied],
        "ties": [other for tie in structure.ties if axis.name in tie for other in tie if other != axis.name],
    }


def _layers(structure: Structure) -> dict[str, list[str]]:
    """Return the parameters of each layer, layers in the order of execution; unused ones come last."""
    layers = defaultdict(list)
    used = [name for name in structure.order if name in structure.parameters]
    for name in (*used, *sorted(structure.parameters - set(used))):
        layers[name.rpartition(".")[0] or name].append(name)
    return dict(layers)


def _row(structure: Structure, module: str, names: Sequence[str], number: Mapping[Dim, int]) -> dict[str, Any]:
    """Return a layer with the sizes of its largest tensor, and what it does with each axis."""
    largest = max(names, key=lambda name: (len(structure.tensors[name]), name in structure.consumers))
    marks: dict[int, str] = {}
    for name in names:
        summed = {node for dim in structure.consumers.get(name, ()) for node in leaves(dim)}
        for node in dict.fromkeys(node for dim in structure.tensors[name] for node in leaves(dim) if node in number):
            mark = "reads" if node in summed else "writes" if name in structure.consumers else "holds"
            if marks.get(number[node], "holds") == "holds":
                marks[number[node]] = mark
    return {
        "name": module,
        "tensors": names,
        "shape": [_tokens(dim, number) for dim in structure.tensors[largest]],
        "marks": marks,
        "params": sum(prod(dim.size for dim in structure.tensors[name]) for name in names),
    }


def _tokens(dim: Dim, number: Mapping[Dim, int]) -> list[list[Any]]:
    """Return an expression as a flat list of [text, number of the axis or None]."""
    dim = dim.find()
    if not dim.op:
        return [[str(dim.size), number.get(dim)]]
    found: list[list[Any]] = []
    for part in flat(dim, dim.op):
        if found:
            found.append([TIMES if dim.op == "*" else "|", None])
        inner = _tokens(part, number)
        found += [["(", None], *inner, [")", None]] if part.op else inner
    return found


# --------------------------------------------------------------------------------------------------------- repetition


@dataclass(frozen=True)
class Run:
    """`times` copies of `period` rows, the first copy at row `start`."""

    start: int
    period: int
    times: int


def repeats(keys: Sequence[Any], names: Sequence[str]) -> list[Run]:
    """Return where equal rows follow each other again and again: at each place the run that covers most.

    Args:
        keys: What makes rows equal.
        names: The names of the rows; runs begin where the numbers in them do, if there is a choice.
    """
    runs, i = [], 0
    while i < len(keys):
        found = _longest(keys, i)
        if found.times > 1:
            starts = range(i, min(i + found.period, len(keys)))
            shifted = (Run(start, found.period, _copies(keys, start, found.period)) for start in starts)
            found = next((r for r in shifted if r.times >= max(2, found.times - 1) and _in_step(names, r)), found)
            runs.append(found)
        i = found.start + found.period * found.times
    return runs


def _longest(keys: Sequence[Any], start: int) -> Run:
    best = Run(start, 1, 1)
    for period in range(1, min(LONGEST_PERIOD, (len(keys) - start) // 2) + 1):
        times = _copies(keys, start, period)
        if times > 1 and times * period > best.times * best.period:
            best = Run(start, period, times)
    return best


def _in_step(names: Sequence[str], run: Run) -> bool:
    """Return whether each copy has one number for all of its rows: blocks.3.norm, blocks.3.fc1 ..."""
    last = run.start + run.period * run.times
    columns = [names[run.start + i : last : run.period] for i in range(run.period)]
    return len({varying_numbers(column) for column in columns}) == 1


def _copies(keys: Sequence[Any], start: int, period: int) -> int:
    times = 1
    while keys[start : start + period] == keys[start + times * period : start + (times + 1) * period]:
        times += 1
    return times


def _alike(row: Mapping[str, Any], axes: Sequence[Axis]) -> tuple[Any, ...]:
    """Return what two rows of repeated blocks have in common."""
    shape = tuple(text for dim in row["shape"] for text, _ in dim)
    marks = tuple((mark, axes[i].size, axes[i].role, axes[i].prunable) for i, mark in row["marks"].items())
    return starred(row["name"]), shape, marks


def _repeat(rows: Sequence[Mapping[str, Any]], run: Run) -> dict[str, Any]:
    last = run.start + run.period * run.times
    names = [row["name"] for row in rows]
    columns = [names[run.start + i : last : run.period] for i in range(run.period)]
    return {**asdict(run), "names": [common_name(column) for column in columns]}
