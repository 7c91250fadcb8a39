"""Turns what a trace has collected into a structure: which axes are free, tied or frozen, and why."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from math import gcd

from torch import nn

from secateur.structure.branches import joined_sums, residual_additions
from secateur.structure.depth import Branch, find_branches
from secateur.structure.dims import Dim, concat, freeze, leaf, leaves, product, size_under
from secateur.structure.inputs import Inputs
from secateur.structure.provenance import Attribute, Expression, Operation, evaluate, read_attribute, sources
from secateur.structure.roles import Role, roles_of
from secateur.structure.structure import Axis, Structure
from secateur.structure.tracer import Constraint, Tracer

NUMBER = "its size is used as a number"


def solve(model: nn.Module, tracer: Tracer, tensors: Mapping[str, list[Dim]], inputs: Inputs) -> Structure:
    """Return the structure that satisfies every equation and every size that the code wrote down."""
    least = _least(tracer)
    attributes, ties = _solve_sizes(model, tracer)
    branches = find_branches(model, tracer)
    consuming = sorted({tracer.operations[i] for i in tracer.sites})
    path = [i for i, name in enumerate(tracer.operations) if name in consuming]
    parameters = frozenset(name for name, _ in model.named_parameters())
    joined = [*(addition.total for addition in residual_additions(tracer)), *joined_sums(tracer)]
    streams = [dim for total in joined for dim in tracer.sums[total]]
    axes = _axes(tensors, parameters, attributes, roles_of(tracer.uses, streams))
    tied = [{axis.name: r[axis.leaf] for axis in axes if axis.prunable and axis.leaf in r} for r in ties]
    return Structure(
        axes=axes,
        ties=tuple(tuple(rates) for rates in tied if len(rates) > 1),
        steps={name: rate for rates in tied for name, rate in rates.items() if rate > 1},
        least={axis.name: least[axis.leaf] for axis in axes if axis.prunable and axis.leaf in least},
        tensors={name: tuple(dims) for name, dims in tensors.items()},
        attributes=attributes,
        path=tuple((tracer.operations[i], tuple(tracer.sites.get(i, ()))) for i in path),
        reads_values=tracer.reads_values,
        consumers={name: tuple(dims) for name, dims in tracer.consumers.items()},
        multiply_adds=tuple(dims for costs in tracer.multiply_adds.values() for dims in costs),
        parameters=parameters,
        outputs={name: tuple(dims) for name, dims in tracer.outputs.items() if dims is not None},
        blocks=_blocks(tracer, joined),
        branches=_named_apart(branches, {axis.name for axis in axes}),
        order=tuple(tracer.used | tracer.trained),
        only_in_training=frozenset(tracer.trained.keys() - tracer.used.keys()),
        inputs=inputs,
    )


def _least(tracer: Tracer) -> dict[Dim, int]:
    """Return how many units of an axis are chosen at once, and freeze where no unit can be spared."""
    least: dict[Dim, int] = {}
    for dim, number, where in tracer.chosen:
        nodes = _wide_leaves(dim)
        if len(nodes) != 1 or nodes[0].size <= number:
            freeze(dim, f"{number} of {dim.size} are chosen ({where})")
        else:
            least[nodes[0]] = max(number, least.get(nodes[0], 1))
    return least


# ------------------------------------------------------------------------------------- sizes that code wrote down


class _Ties:
    """Classes of axes that lose units together; one frozen member freezes all."""

    def __init__(self) -> None:
        self._class_of: dict[Dim, dict[Dim, int]] = {}

    def add(self, a: Dim, b: Dim, where: str) -> None:
        """Say that two dims must stay equally long."""
        left, right = _wide_leaves(a), _wide_leaves(b)
        if left == right and _shape(a) == _shape(b):
            return
        if len(left) == len(right) and (len(left) == 1 or {a.find().op, b.find().op} == {"*"}):
            if [x.size for x in left] == [x.size for x in right]:
                for x, y in zip(left, right, strict=True):
                    self._join({x: 1}, {y: 1})
                return
        for single, many in ((left, b), (right, a)):
            if len(single) == 1 and many.find().op == "*" and single[0] not in _wide_leaves(many):
                return self._follow(single[0], _wide_leaves(many), where)
        freeze(a, f"must stay as long as another dim ({where})")
        freeze(b, f"must stay as long as another dim ({where})")

    def _follow(self, axis: Dim, parts: list[Dim], where: str) -> None:
        """Let an axis be as long as a product: one factor varies (the heads), the others keep their size."""
        varies = next((part for part in parts if not part.reasons), parts[0])
        for part in parts:
            if part is not varies:
                freeze(part, f"a width must stay a multiple of it ({where})")
        self._join({axis: axis.size // varies.size}, {varies: 1})

    def _join(self, a: dict[Dim, int], b: dict[Dim, int]) -> None:
        """Merge the classes of two axes that lose units at these rates."""
        (x, x_rate), (y, y_rate) = *a.items(), *b.items()
        left, right = self.of(x), self.of(y)
        if left is right:
            if left[x] * y_rate != left[y] * x_rate:
                for member in left:
                    freeze(member, "its size would have to follow others at two rates")
            return
        # Scale both classes so that x and y lose units at the given rates.
        up, down = right[y] * x_rate, left[x] * y_rate
        common = gcd(up, down)
        merged = {n: r * up // common for n, r in left.items()} | {n: r * down // common for n, r in right.items()}
        for member in merged:
            self._class_of[member] = merged

    def of(self, leaf: Dim) -> dict[Dim, int]:
        """Return the class of a leaf, itself included: how many units each member loses at a time."""
        return self._class_of.get(leaf, {leaf: 1})

    def events(self, leaf: Dim) -> int:
        """Return how many times the class of a leaf can lose units, if the last units could go too."""
        return min(member.size // rate for member, rate in self.of(leaf).items())

    def after(self, leaf: Dim, events: int) -> dict[Dim, int]:
        """Return the sizes of the class of a leaf after so many losses."""
        return {member: member.size - rate * events for member, rate in self.of(leaf).items()}

    def spread_freezes(self) -> None:
        """Freeze every member of a class in which one is frozen, or that has nothing to lose."""
        for members in self._class_of.values():
            reasons = [reason for member in members for reason in member.reasons]
            if not reasons and self.events(next(iter(members))) < 2:
                reasons = ["one unit"]
            for member in members if reasons else ():
                together = len(members) > 1
                freeze(member, f"must stay as long as an axis that is frozen: {reasons[0]}" if together else reasons[0])

    def keep_multiple(self, dim: Dim, multiple: int, where: str) -> None:
        """Let every axis of a dim lose so many units at a time that it stays a multiple."""
        for node in _wide_leaves(dim):
            if node.size % multiple:
                freeze(node, f"must stay a multiple of {multiple} together with others ({where})")
            rates = self.of(node)
            factor = multiple // gcd(multiple, rates[node])
            wider = {member: rate * factor for member, rate in rates.items()}
            self._class_of.update(dict.fromkeys(wider, wider))

    def classes(self) -> list[dict[Dim, int]]:
        """Return each class once; an axis that loses several units at a time is a class, too."""
        unique = {id(members): members for members in self._class_of.values()}
        return list(unique.values())


def _wide_leaves(dim: Dim) -> list[Dim]:
    return [node for node in leaves(dim) if node.size > 1]


def _shape(dim: Dim) -> str:
    dim = dim.find()
    return dim.op + "".join(f"({_shape(p)})" for p in dim.parts)


def _solve_sizes(model: nn.Module, tracer: Tracer) -> tuple[dict[Attribute, Dim], list[dict[Dim, int]]]:
    attributes: dict[Attribute, Dim] = {}
    ties = _Ties()
    expressions = [*(c.expression for c in tracer.constraints), *(expression for expression, _ in tracer.value_reads)]
    values = {a: read_attribute(model, a) for a in _attributes(expressions)}
    constraints = [*tracer.constraints, *_computed_numbers(tracer, values)]
    _freeze_read(tracer, attributes)  # first, so that a factor that is frozen anyway is not chosen to vary
    for plain in (True, False):  # what an attribute is must be known before something is divided by it
        for constraint in constraints:
            if isinstance(constraint.expression, Operation) != plain:
                _bind(constraint, attributes, values, ties)
    for attribute, dim in tracer.compared:  # what nothing else says: ``if channels != self.channels: raise``
        attributes.setdefault(attribute, dim)
    for pieces, where in tracer.equal_counts:
        for a, b in pairwise(pieces):
            ties.add(a, b, where)
    for dim, multiple, where in tracer.multiples:
        ties.keep_multiple(dim, multiple, where)
    _freeze_read(tracer, attributes)
    ties.spread_freezes()
    for constraint in constraints:
        if isinstance(constraint.expression, Operation):
            _check(constraint, attributes, values, ties)
    ties.spread_freezes()
    return attributes, ties.classes()


def _freeze_read(tracer: Tracer, attributes: Mapping[Attribute, Dim]) -> None:
    """Freeze the sizes that the code uses as numbers, as far as attributes are known to be sizes."""
    for expression, where in tracer.value_reads:
        dim = attributes.get(expression) if isinstance(expression, Attribute) else expression
        if isinstance(dim, Dim):
            freeze(dim, f"{NUMBER} ({where})")


def _computed_numbers(tracer: Tracer, values: Mapping[Attribute, int]) -> list[Constraint]:
    """Return the equations by which a number that the code computes from sizes stays what it is.

    A scale of ``(width // heads) ** -0.5`` allows a cut of the width, if whole heads go with it.
    """
    computed = {expression: where for expression, where in tracer.value_reads if isinstance(expression, Operation)}
    return [
        Constraint(expression, leaf(evaluate(expression, {}, values), f"{NUMBER} ({where})"), where, NUMBER)
        for expression, where in computed.items()
    ]


def _bind(
    constraint: Constraint, attributes: dict[Attribute, Dim], values: Mapping[Attribute, int], ties: _Ties
) -> None:
    expression, dim, where = constraint.expression, constraint.dim, constraint.where
    if isinstance(expression, Attribute):
        if values[expression] != dim.size:
            freeze(dim, f"the code says {expression} = {values[expression]} ({where})")
        elif expression in attributes:
            ties.add(attributes[expression], dim, where)
        else:
            attributes[expression] = dim
    elif isinstance(expression, Dim):
        ties.add(expression, dim, where)
    elif isinstance(expression, int):
        freeze(dim, f"the code says {expression} ({where})")
    else:
        _solve_for_left(expression, dim, where, attributes, values, ties)


def _solve_for_left(
    operation: Operation,
    dim: Dim,
    where: str,
    attributes: dict[Attribute, Dim],
    values: Mapping[Attribute, int],
    ties: _Ties,
) -> None:
    """Read ``left // right = dim`` as left = right x dim, and ``left - right = dim`` as left = right | dim.

    So a residual stream that is divided by the number of heads loses a head's worth of units with each head, and an
    attribute that is halved is two halves long. Anything else is left to `_check`.
    """
    left = operation.left
    right = operation.right
    if isinstance(right, Attribute):
        right = attributes.get(right, values[right])
    if isinstance(right, int) and isinstance(left, Attribute):
        right = leaf(right, f"the code says {right} ({where})")
    if operation.symbol not in ("//", "-") or not isinstance(right, Dim) or not isinstance(left, Attribute | Dim):
        return
    whole = product([right, dim]) if operation.symbol == "//" else concat([right, dim])
    size = values[left] if isinstance(left, Attribute) else left.size
    if whole.size == size:
        _bind(Constraint(left, whole, where), attributes, values, ties)


def _attributes(expressions: Iterable[Expression]) -> set[Attribute]:
    return {s for expression in expressions for s in sources(expression) if isinstance(s, Attribute)}


def _check(
    constraint: Constraint, attributes: Mapping[Attribute, Dim], values: Mapping[Attribute, int], ties: _Ties
) -> None:
    """Freeze the axes for which a computed size would not follow a cut: try each alone, then all together."""
    involved = [constraint.dim]
    for source in sources(constraint.expression):
        involved.append(attributes[source] if source in attributes else source)  # type: ignore[index,arg-type]
    free = [n for d in involved if isinstance(d, Dim) for n in leaves(d) if n.size > 1 and not n.reasons]
    free = list(dict.fromkeys(free))
    reason = f"{constraint.broken} ({constraint.where})"
    for node in free:
        n = ties.events(node)
        trials = {n // 2, 1} if n > 1 else set()
        if not all(_holds(constraint, ties.after(node, lost), attributes, values) for lost in trials):
            freeze(node, reason)
    generator = random.Random(0)
    for _ in range(4):
        sizes: dict[Dim, int] = {}
        for node in free:
            if not node.reasons and node not in sizes:
                sizes |= ties.after(node, generator.randrange(ties.events(node)))
        if not _holds(constraint, sizes, attributes, values):
            for node in free:
                freeze(node, reason)


def _holds(
    constraint: Constraint,
    sizes: Mapping[Dim, int],
    attributes: Mapping[Attribute, Dim],
    values: Mapping[Attribute, int],
) -> bool:
    present = {**values, **{a: size_under(dim, sizes) for a, dim in attributes.items()}}
    expression: Expression = constraint.expression
    try:
        return evaluate(expression, sizes, present) == size_under(constraint.dim, sizes)
    except ZeroDivisionError:
        return False


# -------------------------------------------------------------------------------------------------------- axes


def _axes(
    tensors: Mapping[str, list[Dim]],
    parameters: frozenset[str],
    attributes: Mapping[Attribute, Dim],
    role_of: Callable[[Dim], Role],
) -> tuple[Axis, ...]:
    members: dict[Dim, dict[tuple[str, int], None]] = defaultdict(dict)
    for name, dims in tensors.items():
        for i, dim in enumerate(dims):
            for node in leaves(dim):
                if node.size > 1:
                    members[node].setdefault((name, i))
    owned = {node: tuple(found) for node, found in members.items() if any(n in parameters for n, _ in found)}
    names = _names(owned, tensors, attributes)
    return tuple(
        Axis(names[node], node.size, found, not node.reasons, "; ".join(node.reasons), role_of(node), node)
        for node, found in owned.items()
    )


def _blocks(tracer: Tracer, joined: Iterable[int]) -> tuple[str, ...]:
    """Return the modules in which branches are added up, in order; not the model itself."""
    modules = (tracer.history.values[total].module for total in sorted(joined))
    names = (module.name for module in modules if module is not None)
    return tuple(dict.fromkeys(name for name in names if name and tracer.outputs.get(name) is not None))


def _named_apart(branches: Iterable[Branch], axes: Collection[str]) -> tuple[Branch, ...]:
    """Return the branches under names that no axis has: both are named after modules, and chosen by name."""
    return tuple(replace(b, name=f"{b.name} (branch)") if b.name in axes else b for b in branches)


def _names(
    owned: Mapping[Dim, tuple[tuple[str, int], ...]],
    tensors: Mapping[str, list[Dim]],
    attributes: Mapping[Attribute, Dim],
) -> dict[Dim, str]:
    """Name each axis after the first module that produces it; a factor also after the attribute that is its size."""
    attribute_of = {dim.find(): attribute for attribute, dim in reversed(list(attributes.items())) if not dim.find().op}
    wanted: dict[Dim, str] = {}
    for node, found in owned.items():
        tensor, position = min(found, key=lambda member: (member[1], list(tensors).index(member[0])))
        module = tensor.rpartition(".")[0] or tensor
        inner = tensors[tensor][position].find()
        is_part = inner is not node
        base = module if position == 0 else f"{module}:{position}"
        suffix = f"[{attribute_of[node].name}]" if is_part and node in attribute_of else ""
        wanted[node] = base + suffix
    taken: dict[str, int] = defaultdict(int)
    names: dict[Dim, str] = {}
    for node, name in wanted.items():
        taken[name] += 1
        names[node] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names
