"""What ``secateur inspect --why`` prints: one tensor or axis, what it is tied to, and where in the code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from secateur.cli.common import console, print_json

if TYPE_CHECKING:
    from secateur.structure.dims import Place
    from secateur.structure.explain import Member, Split
    from secateur.structure.structure import Axis, Structure


def show(structure: Structure, name: str, as_json: bool) -> None:
    """Print the explanation of a tensor or axis.

    Raises:
        UnknownName: There is neither.
    """
    from secateur.errors import UnknownName

    axes = {axis.name for axis in structure.axes}
    if name not in axes | structure.tensors.keys():
        raise UnknownName("tensor or axis", name, axes | structure.tensors.keys())
    is_tensor = name in structure.tensors
    if as_json:
        print_json((_tensor_as_dict if is_tensor else _axis_as_dict)(structure, name))
    else:
        (_show_tensor if is_tensor else _show_axis)(structure, name)


def _show_tensor(structure: Structure, name: str) -> None:
    from secateur.structure.explain import explain_axis, explain_tensor

    dims = explain_tensor(structure, name)
    kind = "parameter" if name in structure.parameters else "buffer"
    _say(f"[bold]{escape(name)}[/]: {kind} of shape {' x '.join(str(dim.size) for dim in dims) or '()'}")
    for position, facts in enumerate(dims):
        made_of = f" = {facts.expression}" if len(facts.axes) > 1 else ""
        _say(f"\n[bold]dim {position}[/]: {facts.size}{escape(made_of)}")
        for split in facts.splits:
            _say(f"  {escape(_split_words(split))}")
        for axis in facts.axes:
            _say(f"  {_axis_words(axis)}")
            _show_reasons(axis)
            _show_members(explain_axis(structure, axis, (name, position)))


def _show_axis(structure: Structure, name: str) -> None:
    from secateur.structure.explain import explain_axis, shares
    from secateur.structure.roles import ROLES

    axis = structure.axis(name)
    _say(_axis_words(axis))
    if axis.role:
        _say(f"  One unit is {ROLES[axis.role]}.")
    _show_reasons(axis)
    share = shares(structure, [[axis]])[0]
    _say(f"  It takes part in {100 * share.macs:.1f} % of the MACs and {100 * share.params:.1f} % of the parameters.")
    for tie in structure.ties:
        if name in tie:
            _say(f"  Loses units together with {escape(', '.join(other for other in tie if other != name))}.")
    tensor, dim = axis.members[0]
    _say(f"  It begins at {escape(tensor)}:{dim}.")
    _show_members(explain_axis(structure, axis))


def _axis_words(axis: Axis) -> str:
    role = f", {axis.role}" if axis.role else ""
    state = "[green]free[/]" if axis.prunable else "[yellow]frozen[/]"
    return f"axis [bold]{escape(axis.name)}[/]: {axis.size} units{role}, {state}"


def _show_reasons(axis: Axis) -> None:
    for reason in axis.reason.split("; ") if axis.reason else ():
        _say(f"    frozen: {escape(reason)}")


def _split_words(split: Split) -> str:
    sign = " x " if split.op == "*" else " | "
    return f"taken apart as {sign.join(map(str, split.sizes))} by {place_words(split.place)}"


def _show_members(members: Sequence[Member]) -> None:
    """Print the tensors that share an axis by the place that tied them; repeated blocks in one row."""
    from secateur.structure.explain import common_name, starred

    groups = defaultdict(list)
    for member in members:
        words = place_words(member.place) if member.place is not None else "the same dim"
        line = member.place.line if member.place is not None else ""
        groups[starred(words), line].append((words, f"{member.tensor}:{member.dim}"))
    if not groups:
        _say("    no other tensor shares it")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for found in groups.values():
        places, tensors = zip(*found, strict=True)
        table.add_row(escape(common_name(places)), escape(", ".join(folded(tensors))))
    _say("    shared, because of")
    console.print(Padding(table, (0, 0, 0, 6)))


def folded(names: Sequence[str]) -> list[str]:
    """Return names that differ only in numbers as one name with stars and their count."""
    from secateur.structure.explain import common_name, starred

    groups = defaultdict(list)
    for name in names:
        groups[starred(name)].append(name)
    return [common_name(own) + (f" ({len(own)})" if len(own) > 1 else "") for own in groups.values()]


def place_words(place: Place) -> str:
    """Return a place with its line of code: ``add in blocks.0 (networks.py:93)``."""
    return f"{place} ({Path(place.line).name})" if place.line else str(place)


def _say(text: str) -> None:
    console.print(text, highlight=False)


# --------------------------------------------------------------------------------------------------------------- JSON


def _tensor_as_dict(structure: Structure, name: str) -> dict[str, Any]:
    from secateur.structure.explain import explain_axis, explain_tensor

    return {
        "tensor": name,
        "parameter": name in structure.parameters,
        "dims": [
            {
                "size": facts.size,
                "expression": facts.expression,
                "splits": [{"op": s.op, "sizes": list(s.sizes), **_place(s.place)} for s in facts.splits],
                "axes": [
                    _own_dict(axis) | {"shared": _members(explain_axis(structure, axis, (name, position)))}
                    for axis in facts.axes
                ],
            }
            for position, facts in enumerate(explain_tensor(structure, name))
        ],
    }


def _axis_as_dict(structure: Structure, name: str) -> dict[str, Any]:
    from secateur.structure.explain import explain_axis

    axis = structure.axis(name)
    return _own_dict(axis) | {"begins": list(axis.members[0]), "shared": _members(explain_axis(structure, axis))}


def _own_dict(axis: Axis) -> dict[str, Any]:
    reasons = axis.reason.split("; ") if axis.reason else []
    return {"axis": axis.name, "role": axis.role, "size": axis.size, "prunable": axis.prunable, "reasons": reasons}


def _members(members: Sequence[Member]) -> list[dict[str, Any]]:
    return [{"tensor": m.tensor, "dim": m.dim, **(_place(m.place) if m.place else {})} for m in members]


def _place(place: Place) -> dict[str, str]:
    return {"operation": place.name, "module": place.module, "line": place.line}
