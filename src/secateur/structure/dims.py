"""The algebra of dimensions: every dim of every tensor is an expression over axes.

A dim is a *leaf* (an axis whose inner structure nobody has looked at), a *product* (row-major: a dim of 768 that is
later viewed as 12 x 64 is heads x head_dim), or a *sum* (concatenated segments: qkv = q | k | v). Operations emit
equations between dims; `unify` solves them by merging leaves and by refining leaves into factors or segments.

A dim that cannot be understood is frozen with a reason. Freezing is always safe: a frozen axis is never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where the model's code said something about dims.

    Attributes:
        name: The function or operation.
        module: Path of the module that was running; empty for the model itself.
        line: ``file:number`` of the code outside PyTorch; empty if there is none.
        order: Later places have a larger one.
    """

    name: str
    module: str = ""
    line: str = ""
    order: int = 0

    def __str__(self) -> str:
        return f"{self.name} in {self.module}" if self.module else self.name


class Dim:
    """One dimension; a node of a union-find structure with terms.

    Attributes:
        size: Number of indices on the traced model.
        op: ``""`` for a leaf, ``"*"`` for a product, ``"+"`` for a sum.
        parts: The factors or segments.
        reasons: Why the leaf must not be cut; empty means free.
        bound: What the leaf was found equal to, and where; None while it is an axis.
    """

    __slots__ = ("_link", "bound", "op", "parts", "reasons", "size")

    def __init__(self, size: int, op: str = "", parts: tuple[Dim, ...] = ()) -> None:
        self.size = size
        self.op = op
        self.parts = parts
        self.reasons: list[str] = []
        self.bound: tuple[Dim, Place] | None = None
        self._link: Dim | None = None

    def find(self) -> Dim:
        """Return the representative of this dim."""
        node = self
        while node._link is not None:
            node = node._link
        if node is not self:
            self._link = node  # path compression
        return node

    def __repr__(self) -> str:
        root = self.find()
        if not root.op:
            return f"{root.size}{'!' if root.reasons else ''}"
        return "(" + f" {root.op} ".join(map(repr, root.parts)) + ")"


UNIT_REASON = "size 1"

MOST_REASONS = 8
"""Further reasons say nothing new: an axis that all layers share would collect one from each."""


def leaf(size: int, reason: str = "") -> Dim:
    """Return a new axis of `size` indices, frozen at once if a reason is given."""
    dim = Dim(size)
    if reason:
        dim.reasons.append(reason)
    return dim


def product(dims: Iterable[Dim]) -> Dim:
    """Return the row-major product; factors of size 1 drop out."""
    parts = [f for dim in dims for f in factors(dim)]
    if not parts:
        return leaf(1)
    return parts[0] if len(parts) == 1 else Dim(prod(p.size for p in parts), "*", tuple(parts))


def concat(dims: Iterable[Dim]) -> Dim:
    """Return the sum of segments; empty segments drop out."""
    parts = [s for dim in dims for s in segments(dim)]
    if not parts:
        return leaf(0)
    return parts[0] if len(parts) == 1 else Dim(sum(p.size for p in parts), "+", tuple(parts))


def factors(dim: Dim) -> list[Dim]:
    """Return the flat list of factors of a dim, without those of size 1."""
    return [part for part in flat(dim, "*") if part.size != 1]


def segments(dim: Dim) -> list[Dim]:
    """Return the flat list of segments of a dim, without empty ones."""
    return [part for part in flat(dim, "+") if part.size != 0]


def flat(dim: Dim, op: str) -> list[Dim]:
    """Return the parts of nested terms of the same kind in order, or the dim alone if it is of another kind."""
    found, waiting = [], [dim.find()]
    while waiting:
        node = waiting.pop()
        if node.op == op:
            waiting.extend(part.find() for part in reversed(node.parts))
        else:
            found.append(node)
    return found


def leaves(dim: Dim) -> Iterator[Dim]:
    """Yield the representative leaves of a dim in order; a leaf that occurs twice comes twice."""
    waiting = [dim.find()]
    while waiting:
        node = waiting.pop()
        if node.op:
            waiting.extend(part.find() for part in reversed(node.parts))
        else:
            yield node


def freeze(dim: Dim, reason: str) -> None:
    """Freeze every leaf below `dim`; the first reason is the one that is shown first."""
    for node in leaves(dim):
        if len(node.reasons) < MOST_REASONS and reason not in node.reasons:
            node.reasons.append(reason)


def is_frozen(dim: Dim) -> bool:
    """Return whether no leaf of `dim` can be cut."""
    return all(node.reasons or node.size == 1 for node in leaves(dim))


# ---------------------------------------------------------------------------------------------- unification


def unify(a: Dim, b: Dim, place: Place) -> None:
    """Make two dims equal, as the code at `place` says; where that cannot be expressed, freeze both."""
    if not _unify(a, b, place):
        freeze(a, f"sizes do not align ({place})")
        freeze(b, f"sizes do not align ({place})")


def _unify(a: Dim, b: Dim, place: Place) -> bool:
    a, b = a.find(), b.find()
    if a is b:
        return True
    if a.size != b.size:
        return False
    if not a.op:
        return _bind(a, b, place)
    if not b.op:
        return _bind(b, a, place)
    if a.op == b.op == "*":
        solved = _unify_products(factors(a), factors(b), place)
    elif a.op == b.op == "+":
        solved = _unify_sums(segments(a), segments(b), place)
    elif a.op == "+":
        solved = _unify_sum_with_product(segments(a), factors(b), place)
    else:
        solved = _unify_sum_with_product(segments(b), factors(a), place)
    if solved:
        a._link = b
    return solved


def _bind(node: Dim, term: Dim, place: Place) -> bool:
    """Let the leaf `node` stand for `term`."""
    if term.op and any(inner is node for inner in leaves(term)):
        return False  # an axis cannot contain itself
    for reason in node.reasons:
        freeze(term, reason)
    node._link = term
    node.bound = (term, place)
    return True


def _unify_products(left: list[Dim], right: list[Dim], place: Place) -> bool:
    """Align two lists of factors from the major end, splitting the larger factor where it divides."""
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        if x.size % y.size:
            return False
        if x.size == y.size:
            solved = _unify(x, y, place)
        else:
            rest = leaf(x.size // y.size)
            solved = _unify(x, product([y, rest]), place)
            left[:0] = factors(rest)
        if not solved:
            return False
    return not left and not right


def _unify_sums(left: list[Dim], right: list[Dim], place: Place) -> bool:
    """Align two lists of segments: a long segment is a run of the other's, the last of which may be split."""
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        run, missing = [y], x.size - y.size
        while right and right[0].size <= missing:
            missing -= right[0].size
            run.append(right.pop(0))
        if missing:
            run.append(leaf(missing))
            left.insert(0, run[-1])
        if not _unify(x, concat(run), place):
            return False
    return not left and not right


def _unify_sum_with_product(parts: list[Dim], facs: list[Dim], place: Place) -> bool:
    """Solve s1 | s2 | ... = p x rest: the major factor is a sum too, p = c1 | c2 | ..., with s_i = c_i x rest."""
    major, rest = facs[0], facs[1:]
    stride = prod(f.size for f in rest)
    if any(part.size % stride for part in parts):
        return False
    counts = [leaf(part.size // stride) for part in parts]
    if not _unify(major, concat(counts), place):
        return False
    return all(_unify(part, product([c, *rest]), place) for part, c in zip(parts, counts, strict=True))


def split(dim: Dim, sizes: Sequence[int], place: Place) -> list[Dim]:
    """Return the consecutive segments of `dim` with the given sizes."""
    pieces = [leaf(size) for size in sizes]
    unify(dim, concat(pieces), place)
    return pieces


# ---------------------------------------------------------------------------------- evaluation over kept units


def shrunk(dim: Dim, sizes: Mapping[Dim, int], done: dict[Dim, Dim]) -> Dim:
    """Return the same expression over new leaves of the given sizes; `done` remembers what each leaf became."""
    dim = dim.find()
    if dim not in done:
        parts = tuple(shrunk(part, sizes, done) for part in flat(dim, dim.op)) if dim.op else ()
        done[dim] = Dim(size_under(dim, sizes), dim.op, parts)
        done[dim].reasons = list(dim.reasons)
    return done[dim]


def size_under(dim: Dim, sizes: Mapping[Dim, int]) -> int:
    """Return the size of `dim` when the leaves have the given sizes (default: their own)."""
    dim = dim.find()
    if dim.op == "*":
        return prod(size_under(p, sizes) for p in flat(dim, "*"))
    if dim.op == "+":
        return sum(size_under(p, sizes) for p in flat(dim, "+"))
    return sizes.get(dim, dim.size)


def mask_under(dim: Dim, masks: Mapping[Dim, Tensor]) -> Tensor:
    """Return which indices of `dim` survive when the leaves keep the given units; bool of shape (size,)."""
    return _over_indices(dim, lambda node: masks.get(node, torch.ones(node.size, dtype=torch.bool)), torch.logical_and)


def order_under(dim: Dim, orders: Mapping[Dim, Tensor]) -> Tensor:
    """Return the reordering of the indices of `dim` when the leaves are reordered; long of shape (size,)."""
    dim = dim.find()
    if not dim.op:
        return orders.get(dim, torch.arange(dim.size))
    inner = [order_under(part, orders) for part in flat(dim, dim.op)]
    result = inner[0]
    for index in inner[1:]:
        if dim.op == "*":
            result = (result[:, None] * index.numel() + index[None, :]).flatten()
        else:
            result = torch.cat([result, index + result.numel()])
    return result


def unit_index(dim: Dim, axis: Dim) -> Tensor:
    """Return, for each index of `dim`, the unit of `axis` that it belongs to, or -1; long of shape (size,)."""
    axis = axis.find()

    def own(node: Dim) -> Tensor:
        return torch.arange(node.size) if node is axis else torch.full((node.size,), -1)

    return _over_indices(dim, own, torch.maximum)


def _over_indices(dim: Dim, of_leaf: Callable[[Dim], Tensor], combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return one value per index of `dim`: leaves by `of_leaf`, factors joined by `combine`, segments in a row."""
    dim = dim.find()
    if not dim.op:
        return of_leaf(dim)
    inner = [_over_indices(part, of_leaf, combine) for part in flat(dim, dim.op)]
    if dim.op == "+":
        return torch.cat(inner)
    result = inner[0]
    for values in inner[1:]:
        result = combine(result[:, None], values[None, :]).flatten()
    return result
