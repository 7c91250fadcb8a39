"""Says what the analysis found about one tensor or axis and where in the model's code that came from.

Whenever a dim turns out to be equal to another one, it remembers the place (`Dim.bound`). These memories form a forest:
the way from the dim of a tensor up to its axis names every operation that had a say, and where the ways of two
tensors meet is the operation that tied them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from secateur.structure.dims import Dim, Place, flat, leaves, size_under
from secateur.structure.structure import Axis, Structure


@dataclass(frozen=True)
class Member:
    """A dim of a tensor that holds an axis, and the place that tied it to the member that was asked about."""

    tensor: str
    dim: int
    place: Place | None


@dataclass(frozen=True)
class Split:
    """A place where a dim was taken apart: into factors (``*``) or segments (``+``) of these sizes."""

    op: str
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class DimFacts:
    """One dim of a tensor.

    Attributes:
        size: Its size.
        expression: What it is made of: ``3 x 12 x 64``, ``256 | 256``.
        splits: Where it was taken apart.
        axes: The axes below it, in order; sizes of 1 are none.
    """

    size: int
    expression: str
    splits: tuple[Split, ...]
    axes: tuple[Axis, ...]


def explain_tensor(structure: Structure, name: str) -> tuple[DimFacts, ...]:
    """Return the facts about each dim of a parameter or buffer.

    Raises:
        KeyError: No such tensor.
    """
    axis_of = {axis.leaf: axis for axis in structure.axes}
    return tuple(
        DimFacts(
            dim.size,
            expression(dim),
            tuple(_splits(dim)),
            tuple(dict.fromkeys(axis_of[node] for node in leaves(dim) if node in axis_of)),
        )
        for dim in structure.tensors[name]
    )


def explain_axis(structure: Structure, axis: Axis, seen_from: tuple[str, int] | None = None) -> tuple[Member, ...]:
    """Return the other members of an axis with the places that tied them to one of them.

    Args:
        structure: What `trace` found.
        axis: One of its axes.
        seen_from: A member; default: the first.
    """
    start = seen_from or axis.members[0]
    own = _way(structure.tensors[start[0]][start[1]], axis.leaf)
    return tuple(
        Member(tensor, dim, _meeting(own, _way(structure.tensors[tensor][dim], axis.leaf)))
        for tensor, dim in axis.members
        if (tensor, dim) != start
    )


def expression(dim: Dim) -> str:
    """Return a dim as sizes: ``x`` between factors, ``|`` between segments, ``!`` behind what must not be cut."""
    dim = dim.find()
    if not dim.op:
        return f"{dim.size}{'!' if dim.reasons else ''}"
    parts = [f"({expression(part)})" if part.op else expression(part) for part in flat(dim, dim.op)]
    return (" x " if dim.op == "*" else " | ").join(parts)


# ------------------------------------------------------------------------------------------------- where it came from

_Way = list[tuple[Dim, Place | None]]
"""The nodes from a dim to an axis, each with the place that found it equal to the next (None: a part of it is next)."""


def _way(dim: Dim, axis: Dim) -> _Way:
    way: _Way = []
    node = dim
    while node is not axis:
        if node.bound is not None:
            way.append((node, node.bound[1]))
            node = node.bound[0]
        else:
            way.append((node, None))
            node = next(part for part in node.parts if axis in leaves(part))
    return [*way, (axis, None)]


def _meeting(first: _Way, second: _Way) -> Place | None:
    """Return the place that joined two ways: the last one before their first common node."""
    known = {node: i for i, (node, _) in enumerate(first)}
    end = next(i for i, (node, _) in enumerate(second) if node in known)
    places = [place for _, place in (*first[: known[second[end][0]]], *second[:end]) if place is not None]
    return max(places, key=lambda place: place.order, default=None)


def _splits(dim: Dim) -> Iterator[Split]:
    """Yield the places where a dim was taken apart, outermost first."""
    waiting, seen = [dim], set()
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.bound is not None:
            term, place = node.bound
            if term.op:
                yield Split(term.op, tuple(part.size for part in term.parts), place)
            waiting.append(term)
        waiting.extend(node.parts)


# -------------------------------------------------------------------------------------------------- shares of the cost


@dataclass(frozen=True)
class Share:
    """The fractions of all multiply-adds and parameters in which axes take part; both from 0 to 1."""

    macs: float
    params: float


def shares(structure: Structure, groups: Iterable[Sequence[Axis]]) -> list[Share]:
    """Return what would go if each group of axes had no unit left."""
    products = [structure.tensors[name] for name in sorted(structure.parameters)]
    split_at = len(products)
    products += structure.multiply_adds
    full = [prod(dim.size for dim in dims) for dims in products]
    params, macs = sum(full[:split_at]), sum(full[split_at:])
    where: dict[Dim, list[int]] = defaultdict(list)
    for i, dims in enumerate(products):
        for node in dict.fromkeys(node for dim in dims for node in leaves(dim)):
            where[node].append(i)
    found = []
    for group in groups:
        gone = dict.fromkeys((axis.leaf for axis in group), 0)
        touched = {i for node in gone for i in where[node]}
        lost = {i: full[i] - prod(size_under(dim, gone) for dim in products[i]) for i in touched}
        lost_params = sum(n for i, n in lost.items() if i < split_at)
        found.append(Share((sum(lost.values()) - lost_params) / max(macs, 1), lost_params / max(params, 1)))
    return found


def uncuttable(structure: Structure) -> dict[str, int]:
    """Return the parameters of which no dim holds a free axis, with their sizes, largest first."""
    free = {axis.leaf for axis in structure.prunable}
    sizes = {
        name: prod(dim.size for dim in structure.tensors[name])
        for name in sorted(structure.parameters)
        if not any(node in free for dim in structure.tensors[name] for node in leaves(dim))
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


# ---------------------------------------------------------------------------------------------------- repeated blocks


@dataclass(frozen=True)
class Family:
    """Axes of repeated blocks that are alike: ``blocks.*.mlp.fc1``."""

    name: str
    axes: tuple[Axis, ...]


def families(axes: Iterable[Axis]) -> list[Family]:
    """Return axes in groups: equal but for numbers in their names and reasons, of one size and one role."""
    groups: dict[tuple[object, ...], list[Axis]] = defaultdict(list)
    for axis in axes:
        groups[starred(axis.name), axis.size, axis.role, starred(axis.reason)].append(axis)
    return [Family(common_name([axis.name for axis in group]), tuple(group)) for group in groups.values()]


_NUMBER = r"(?<![\w:])(\d+)(?=[.:\[ ]|$)"  # of a block in a path: the 3 of blocks.3.fc1:0, not the 1


def starred(name: str) -> str:
    """Return a name with stars for the numbers of blocks: names of repeated blocks become equal."""
    return re.sub(_NUMBER, "*", name)


def common_name(names: Sequence[str]) -> str:
    """Return names that are equal when `starred` as one: the numbers that differ become stars."""
    split = [re.split(_NUMBER, name) for name in names]
    return "".join(pieces[0] if len(set(pieces)) == 1 else "*" for pieces in zip(*split, strict=True))


def varying_numbers(names: Sequence[str]) -> tuple[str, ...]:
    """Return the first number that differs among names that are equal when `starred`, for each name; or nothing."""
    columns = zip(*(re.findall(_NUMBER, name) for name in names), strict=True)
    return next((column for column in columns if len(set(column)) > 1), ())
