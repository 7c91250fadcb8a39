"""Integers that a model remembers but does not read when it runs, and what they follow from.

The trace finds the integers that ``forward`` reads. Others are read by code that runs at another time: by a constructor
(``config.hidden_size``), or by a method that builds a new layer (``num_features``). Such code is run once, on a copy
without weights in which every integer remembers its place; then each layer shows from which places its sizes came, and
the sizes of layers are known.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from secateur.errors import InvalidInputs
from secateur.structure.dims import size_under
from secateur.structure.inputs import Inputs, call_with_state, relative_error, state_of, undisturbed
from secateur.structure.plan import AttributeChange, Plan
from secateur.structure.provenance import (
    Attribute,
    Expression,
    TracedInt,
    evaluate,
    held_numbers,
    sources,
    write_attribute,
)
from secateur.structure.structure import Structure
from secateur.structure.surgery import layer_size
from secateur.structure.weightless import computation


@dataclass(frozen=True)
class Origins:
    """Where the integers of an uncut model came from, when some code has run.

    Attributes:
        expressions: How the integer at each place was computed from the integers at others.
        values: Every number that the model held.
        sizes_of: Places in layers of PyTorch's: the tensor and the dim that they are the size of.
    """

    expressions: Mapping[Attribute, Expression]
    values: Mapping[Attribute, int | float]
    sizes_of: Mapping[Attribute, tuple[str, int]]

    def stated(self, structure: Structure, plan: Plan) -> dict[Attribute, set[int]]:
        """Return the values that the cut layers ask of each place; more than one if they do not agree."""
        sizes = structure.sizes({name: len(axis.kept) for name, axis in plan.axes.items()})
        direct: dict[Attribute, set[int]] = defaultdict(set)
        computed: list[tuple[Expression, int]] = []
        for place, expression in self.expressions.items():
            dim = structure.attributes.get(place)
            if dim is None and place in self.sizes_of:
                tensor, position = self.sizes_of[place]
                dim = structure.tensors[tensor][position]
            if dim is not None and isinstance(expression, Attribute):
                direct[expression].add(size_under(dim, sizes))
            elif dim is not None:
                computed.append((expression, size_under(dim, sizes)))
        return {**direct, **self._solved(computed, direct)}

    def _solved(
        self, computed: list[tuple[Expression, int]], direct: Mapping[Attribute, set[int]]
    ) -> dict[Attribute, set[int]]:
        """Return the places that follow from computed sizes: heads x head_dim = size, where head_dim is known."""
        solved: dict[Attribute, set[int]] = defaultdict(set)
        for expression, size in computed:
            places = _places(expression)
            unknown = [place for place in places if place not in direct]
            known = {place: next(iter(direct[place])) for place in places - {*unknown} if len(direct[place]) == 1}
            if len(unknown) == 1 == len(places) - len(known):
                trials = range(1, int(self.values[unknown[0]]) + 1)
                solved[unknown[0]] |= {n for n in trials if evaluate(expression, {}, {**known, unknown[0]: n}) == size}
        return solved

    def changes(
        self, stated: Mapping[Attribute, set[int]], structure: Structure, plan: Plan
    ) -> tuple[AttributeChange, ...]:
        """Return what follows for every remembered integer from the places whose value is not in doubt.

        Integers that the code reads when it runs follow their own axis, whatever they came from. So do those of
        PyTorch's layers. Modules that were dropped remember nothing.
        """
        gone = tuple(f"{dropped.module}." for dropped in plan.dropped)
        used = {place for expression in self.expressions.values() for place in _places(expression)}
        before = {place: int(self.values[place]) for place in used}
        after = {place: n for place, n in before.items() if not stated.get(place)}
        after |= {place: next(iter(found)) for place, found in stated.items() if len(found) == 1}
        changes = []
        for place, expression in self.expressions.items():
            follows = place in structure.attributes or place in self.sizes_of
            if follows or f"{place.module}.".startswith(gone) or not after.keys() >= _places(expression):
                continue
            old, new = int(self.values[place]), evaluate(expression, {}, after)
            if old != new and evaluate(expression, {}, before) == old:
                changes.append(change(place, old, new))
        return tuple(changes)


def read_origins(model: nn.Module, after: nn.Module) -> Origins:
    """Return the origins of the integers in `model`, found in `after`: a copy where code ran on traced ones."""
    names = {id(tensor): name for name, tensor in state_of(model).items()}
    values = dict(held_numbers(model))
    sizes = {place: layer_size(model.get_submodule(place.module), place.name) for place in values}
    return Origins(
        expressions={p: n.expression for p, n in held_numbers(after) if isinstance(n, TracedInt) and p in values},
        values=values,
        sizes_of={place: (names[id(found[0])], found[1]) for place, found in sizes.items() if found},
    )


def change(place: Attribute, before: int, after: int) -> AttributeChange:
    """Return the change of the integer at a place."""
    return AttributeChange(module=place.module, name=place.name, index=place.index, before=before, after=after)


def write_harmlessly(small: nn.Module, inputs: Inputs, changes: tuple[AttributeChange, ...]) -> bool:
    """Write changes into `small`, or none if it then computes something else, for some code computes with them.

    Returns:
        Whether they were written.
    """
    if not changes or _same_operations(small, inputs, changes):
        _write(small, changes)
        return True
    with undisturbed(small):
        before = call_with_state(small, state_of(small), inputs)
    _write(small, changes)
    with undisturbed(small), suppress(InvalidInputs):
        if relative_error(call_with_state(small, state_of(small), inputs), before) == 0:
            return True
    undo(small, changes)
    return False


def _same_operations(small: nn.Module, inputs: Inputs, changes: tuple[AttributeChange, ...]) -> bool:
    """Return whether `small` runs the same operations on the same numbers with the changes as without them."""
    try:
        before = computation(small, inputs)
        _write(small, changes)
        return computation(small, inputs).same(before)
    except InvalidInputs:
        return False
    finally:
        undo(small, changes)


def _write(small: nn.Module, changes: tuple[AttributeChange, ...]) -> None:
    for each in changes:
        write_attribute(small, Attribute(each.module, each.name, each.index), each.after)


def undo(small: nn.Module, changes: tuple[AttributeChange, ...]) -> None:
    """Write the integers before the changes back; mutates `small`."""
    for each in changes:
        write_attribute(small, Attribute(each.module, each.name, each.index), each.before)


def _places(expression: Expression) -> set[Attribute]:
    return {source for source in sources(expression) if isinstance(source, Attribute)}
