"""Configurations tell the truth after a cut, where they can.

Many models keep the object that they were built from (``model.config``), and other code believes what it says: caches,
adapters, whoever loads the model again. Which fields state which widths is found by provenance, without a table per
kind of model: the model is built once more from a copy of its configuration in which every integer remembers its
field (on the meta device, so it costs no memory), and then each layer shows which fields became its sizes.

A field that all its layers agree on after the cut is rewritten. Where layers of one field have become different, no
value would be true: the field stays, and a note in the configuration says so, at which loaders fail. Whether the
configuration expresses the network is decided by building one from it: same shapes, and the same numbers in every
module.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.structure.inputs import state_of
from secateur.structure.origins import Origins, read_origins, undo, write_harmlessly
from secateur.structure.plan import Plan
from secateur.structure.provenance import Attribute, Listener, TracedInt, held_numbers, is_settings, read_attribute
from secateur.structure.structure import Structure
from secateur.structure.surgery import FIELD, write_note


@dataclass(frozen=True)
class Settings:
    """What the configuration of a network said before any cut.

    Attributes:
        origins: How each integer in the model was computed from fields.
        adjusted: Numbers that were set after the network was built.
        saved: The tensors that a state dict holds.
    """

    origins: Origins
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
            cannot express the cut. A change after which the network computes something else is not made. None is made
            if a network built from the changed configuration would fit the weights but compute something else, or if
            the changed configuration breaks rules of its own, so that it could not even be saved.
        """
        stated = self.origins.stated(structure, plan)
        changes = self.origins.changes(stated, structure, plan)
        changes = changes if write_harmlessly(small, structure.inputs, changes) else ()
        config = copy.deepcopy(getattr(small, FIELD))
        valid = _accepts_itself(config)
        rebuilt = _rebuilt(type(small), config) if valid else None
        expressed = rebuilt is not None and self._computes_alike(rebuilt, small, plan)
        if not valid or (rebuilt is not None and not expressed and self._takes_weights(rebuilt, small)):
            undo(small, changes)
            changes = ()
        plan = plan.model_copy(update={"attributes": (*plan.attributes, *changes)})
        if not expressed:
            plan = plan.model_copy(update={"note": _note(small, stated)})
            write_note(small, plan)
        return plan

    def _takes_weights(self, rebuilt: nn.Module, small: nn.Module) -> bool:
        """Return whether a network that was built anew takes the weights of `small`, whatever it computes with them."""
        shapes = _shapes(rebuilt)
        return all(shapes.get(name) == shape for name, shape in _shapes(small).items() if name in self.saved)

    def _computes_alike(self, rebuilt: nn.Module, small: nn.Module, plan: Plan) -> bool:
        """Return whether a network that was built anew computes what `small` does.

        Every number that the constructor computes (a scale from a head width) must be equal. Buffers that files leave
        out must be whole: their values come from sizes, too (rotary frequencies).
        """
        same = _shapes(rebuilt) == _shapes(small) and _differing(rebuilt, small) <= self.adjusted
        return same and plan.tensors.keys() <= self.saved


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
    return Settings(
        origins=read_origins(model, rebuilt),
        adjusted=frozenset(_differing(rebuilt, model)),
        saved=frozenset(model.state_dict()),
    )


class _FieldInt(TracedInt):
    """An integer of a configuration; copies of the configuration are traced, too."""

    def __deepcopy__(self, memo: Any) -> _FieldInt:
        return self


def _trace_fields(config: Any, prefix: str) -> None:
    def traced(value: int, name: str, index: int | None = None) -> _FieldInt:
        return _FieldInt(value, Attribute("", prefix + name, index), Listener())

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


def _accepts_itself(config: Any) -> bool:
    """Return whether a configuration that knows rules for its fields finds them kept; it could not be loaded else."""
    try:
        getattr(config, "validate", lambda: None)()
    except Exception:  # any rule may fail in its own way
        return False
    return True


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state_of(model).items()}


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
