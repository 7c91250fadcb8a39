"""Configurations tell the truth after a cut, where they can.

Many models keep the object that they were built from (``model.config``), and other code believes what it says: caches,
adapters, whoever loads the model again. Which fields state which widths is found by provenance, without a table per
kind of model: the model is built once more from a copy of its configuration in which every integer remembers its
field (on the meta device, so it costs no memory), and then each layer shows which fields became its sizes.

A field that all its layers agree on after the cut is rewritten. Where layers of one field have become different, no
value would be true: the field stays, and a note in the configuration says so. Whether the configuration expresses the
network is decided by building one from it: same shapes, and the same numbers in every module.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
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
    is_settings,
    read_attribute,
    sources,
    write_attribute,
)
from secateur.structure.structure import Structure
from secateur.structure.surgery import FIELD, layer_size, write_note


@dataclass(frozen=True)
class Settings:
    """What the configuration of a network said before any cut.

    Attributes:
        origins: How each integer in the model was computed from fields; an integer is named by its place.
        values: Every number that the model held.
        sizes_of: Integers that layers of PyTorch's keep: the tensor and the dim that they are the size of.
        adjusted: Numbers that were set after the network was built.
        saved: The tensors that a state dict holds.
    """

    origins: Mapping[Attribute, Expression]
    values: Mapping[Attribute, int | float]
    sizes_of: Mapping[Attribute, tuple[str, int]]
    adjusted: frozenset[Attribute]
    saved: frozenset[str]

    def state(self, small: nn.Module, structure: Structure, plan: Plan) -> Plan:
        """Let the configuration of `small` say what was cut; mutates `small`.

        Args:
            small: The network after the cut.
            structure: The structure before the cut.
            plan: What remains.

        Returns:
            The plan with these changes, so that a loaded network has them, too; with a note if the configuration
            cannot express the cut. A change after which the network computes something else is not made, and none is
            if a network built from the changed configuration would fit the weights but compute something else.
        """
        stated = self._stated(structure, plan)
        changes = self._changes(stated, known=structure.attributes.keys())
        changes = changes if _apply_harmlessly(small, structure.inputs, changes) else ()
        rebuilt = _rebuilt(type(small), copy.deepcopy(getattr(small, FIELD)))
        fits = rebuilt is not None and _shapes(rebuilt) == _shapes(small)
        expressed = fits and rebuilt is not None and self._computes_alike(rebuilt, small, plan)
        if fits and not expressed:
            _undo(small, changes)
            changes = ()
        plan = plan.model_copy(update={"attributes": (*plan.attributes, *changes)})
        if not expressed:
            plan = plan.model_copy(update={"note": _note(small, stated)})
            write_note(small, plan)
        return plan

    def _stated(self, structure: Structure, plan: Plan) -> dict[Attribute, set[int]]:
        """Return the values that the cut layers ask of each field; more than one if they do not agree."""
        sizes = structure.sizes({name: len(axis.kept) for name, axis in plan.axes.items()})
        direct: dict[Attribute, set[int]] = defaultdict(set)
        computed: list[tuple[Expression, int]] = []
        for attribute, expression in self.origins.items():
            dim = structure.attributes.get(attribute)
            if dim is None and attribute in self.sizes_of:
                tensor, position = self.sizes_of[attribute]
                dim = structure.tensors[tensor][position]
            if dim is not None and isinstance(expression, Attribute):
                direct[expression].add(size_under(dim, sizes))
            elif dim is not None:
                computed.append((expression, size_under(dim, sizes)))
        return {**direct, **self._solved(computed, direct)}

    def _solved(
        self, computed: list[tuple[Expression, int]], direct: Mapping[Attribute, set[int]]
    ) -> dict[Attribute, set[int]]:
        """Return the fields that follow from computed sizes: heads x head_dim = size, where head_dim is known."""
        solved: dict[Attribute, set[int]] = defaultdict(set)
        for expression, size in computed:
            fields = _fields(expression)
            unknown = [field for field in fields if field not in direct]
            known = {field: next(iter(direct[field])) for field in fields - {*unknown} if len(direct[field]) == 1}
            if len(unknown) == 1 == len(fields) - len(known):
                trials = range(1, int(self.values[unknown[0]]) + 1)
                solved[unknown[0]] |= {n for n in trials if evaluate(expression, {}, {**known, unknown[0]: n}) == size}
        return solved

    def _changes(self, stated: Mapping[Attribute, set[int]], known: Set[Attribute]) -> tuple[AttributeChange, ...]:
        """Return what follows for every remembered integer from the fields whose value is not in doubt.

        Integers that the code reads when it runs are `known`: they follow their own axis, whatever a field says. So do
        those of PyTorch's layers.
        """
        fields = {field for expression in self.origins.values() for field in _fields(expression)}
        values = {field: int(self.values[field]) for field in fields if not stated.get(field)}
        values |= {field: next(iter(found)) for field, found in stated.items() if len(found) == 1}
        changes = []
        for place, expression in self.origins.items():
            if place in known or place in self.sizes_of or not values.keys() >= _fields(expression):
                continue
            before, after = int(self.values[place]), evaluate(expression, {}, values)
            if before != after:
                changes.append(
                    AttributeChange(module=place.module, name=place.name, index=place.index, before=before, after=after)
                )
        return tuple(changes)

    def _computes_alike(self, rebuilt: nn.Module, small: nn.Module, plan: Plan) -> bool:
        """Return whether a network of the same shapes that was built anew computes what `small` does.

        Every number that the constructor computes (a scale from a head width) must be equal. Buffers that files leave
        out must be whole: their values come from sizes, too (rotary frequencies).
        """
        return plan.tensors.keys() <= self.saved and _differing(rebuilt, small) <= self.adjusted


def read_settings(model: nn.Module) -> Settings | None:
    """Return what the configuration of an uncut network says; None if it keeps none that it can be built from."""
    config = getattr(model, FIELD, None)
    if not is_settings(config):
        return None
    traced = copy.deepcopy(config)
    _trace_fields(traced, f"{FIELD}.")
    rebuilt = _rebuilt(type(model), traced)
    if rebuilt is None or _shapes(rebuilt) != _shapes(model):
        return None
    names = {id(tensor): name for name, tensor in state_of(model).items()}
    sizes = {place: layer_size(model.get_submodule(place.module), place.name) for place, _ in held_numbers(model)}
    return Settings(
        origins={place: n.expression for place, n in held_numbers(rebuilt) if isinstance(n, TracedInt)},
        values=dict(held_numbers(model)),
        sizes_of={place: (names[id(found[0])], found[1]) for place, found in sizes.items() if found},
        adjusted=frozenset(_differing(rebuilt, model)),
        saved=frozenset(model.state_dict()),
    )


def _fields(expression: Expression) -> set[Attribute]:
    return {source for source in sources(expression) if isinstance(source, Attribute)}


class _FieldInt(TracedInt):
    """An integer of a configuration; copies of the configuration are traced, too."""

    def __deepcopy__(self, memo: Any) -> _FieldInt:
        return self


def _trace_fields(config: Any, prefix: str) -> None:
    def traced(value: int, name: str, index: int | None = None) -> _FieldInt:
        return _FieldInt(value, Attribute("", prefix + name, index), lambda expression: None)

    for name, value in list(vars(config).items()):
        if type(value) is int:
            vars(config)[name] = traced(value, name)
        elif type(value) in (tuple, list) and all(type(item) is int for item in value):
            vars(config)[name] = type(value)(traced(item, name, i) for i, item in enumerate(value))
        elif is_settings(value) and not name.startswith("_"):
            _trace_fields(value, f"{prefix}{name}.")


def _rebuilt(kind: type[nn.Module], config: Any) -> nn.Module | None:
    """Return a weightless model built from a configuration, or None if that is not how this kind of model is built."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return kind(config)
    except Exception:  # any constructor may be asked here, and may refuse in its own way
        return None


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state_of(model).items()}


def _apply_harmlessly(small: nn.Module, inputs: Inputs, changes: tuple[AttributeChange, ...]) -> bool:
    """Write the changes, or none if the network then computes something else: some code computes with its settings."""
    with undisturbed(small):
        before = call_with_state(small, state_of(small), inputs)
    for change in changes:
        write_attribute(small, Attribute(change.module, change.name, change.index), change.after)
    with undisturbed(small), suppress(InvalidInputs):
        if relative_error(call_with_state(small, state_of(small), inputs), before) == 0:
            return True
    _undo(small, changes)
    return False


def _undo(small: nn.Module, changes: tuple[AttributeChange, ...]) -> None:
    for change in changes:
        write_attribute(small, Attribute(change.module, change.name, change.index), change.before)


def _differing(model: nn.Module, other: nn.Module) -> set[Attribute]:
    ours, theirs = dict(held_numbers(model)), dict(held_numbers(other))
    return {attribute for attribute in ours.keys() | theirs.keys() if ours.get(attribute) != theirs.get(attribute)}


def _note(small: nn.Module, stated: Mapping[Attribute, set[int]]) -> str:
    needed = {field: sizes for field, sizes in stated.items() if sizes and sizes != {read_attribute(small, field)}}
    listed = "; ".join(
        f"{str(f).removeprefix(f'{FIELD}.')}: {', '.join(map(str, sorted(s)))}" for f, s in needed.items()
    )
    return (
        "This network was pruned, and this configuration cannot express it: do not build a network from it. Load it "
        f"with secateur.load(file, build).{f' Fields, and what is true of them here: {listed}.' if listed else ''}"
    )
