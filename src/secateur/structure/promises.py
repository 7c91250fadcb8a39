"""What timm promises about its models beyond ``forward``, and keeps after a cut.

Each of timm's models has the same methods and integers, whatever its family: ``reset_classifier(n)`` builds a new head,
``num_features`` counts the channels that ``forward_features`` returns, ``head_hidden_size`` those that
``forward_head(pre_logits=True)`` returns, ``feature_info`` the channels that some modules return. ``forward`` reads
none of these integers. They are found by running the methods: `reset_classifier` on a copy in which every integer
remembers its place, the others before and after the cut. Integers about which neither says anything stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.structure.inputs import Inputs, holding, modules_of, undisturbed
from secateur.structure.origins import Origins, change, read_origins, write_harmlessly
from secateur.structure.plan import Plan
from secateur.structure.provenance import Attribute, Expression, Listener, read_attribute, traced_attributes
from secateur.structure.structure import Structure
from secateur.structure.surgery import skeleton
from secateur.structure.weightless import KnownValues

Shapes = Mapping[Attribute, torch.Size]
"""For integers that count channels, the shape of the tensor whose channels they count."""


@dataclass(frozen=True)
class Promises:
    """What held before any cut.

    Attributes:
        origins: Which integers `reset_classifier` builds layers from.
        shapes: The tensors whose channels integers count.
        counted: Those integers.
        equal: Pairs of places that `reset_classifier` compares, and that were equal.
    """

    origins: Origins
    shapes: Shapes
    counted: Mapping[Attribute, int]
    equal: Collection[tuple[Attribute, Attribute]]

    def state(self, small: nn.Module, structure: Structure, plan: Plan) -> Plan:
        """Let the integers of `small` follow the cut; mutates `small`.

        Returns:
            The plan with these changes.
        """
        stated = self.origins.stated(structure, plan)
        changes = {_place(c): c for c in self.origins.changes(stated, structure, plan)}
        shapes = _shapes(small, structure.inputs)
        for place, before in self.counted.items():
            pairs = zip(self.shapes[place][1:], shapes.get(place, torch.Size())[1:], strict=False)
            sizes = {after for dense, after in pairs if dense == before}  # the first dim is the batch
            if len(sizes) == 1 and place not in structure.attributes:
                changes[place] = change(place, before, sizes.pop())
        follows = {b: a for pair in self.equal for a, b in (pair, pair[::-1]) if a in changes and b not in changes}
        for place in follows.keys() - structure.attributes.keys() - self.origins.sizes_of.keys():
            source = changes[follows[place]]
            changes[place] = change(place, source.before, source.after)
        real = tuple(c for c in changes.values() if c.before != c.after)
        if not write_harmlessly(small, structure.inputs, real):
            return plan
        return plan.model_copy(update={"attributes": (*plan.attributes, *real)})


def read_promises(model: nn.Module, inputs: Inputs) -> Promises | None:
    """Return what holds of an uncut model; None if it is none of timm's."""
    if not all(callable(getattr(model, name, None)) for name in ("forward_features", "reset_classifier")):
        return None
    copied = skeleton(model)
    compared = _Compared()
    with traced_attributes(copied, compared), torch.device("meta"):
        with suppress(Exception):  # some heads cannot be reset, each in its own way
            copied.reset_classifier(2)  # type: ignore[operator]
        origins = read_origins(model, copied)
    shapes = _shapes(model, inputs)
    return Promises(origins, shapes, {place: read_attribute(model, place) for place in shapes}, compared.equal)


class _Compared(Listener):
    """Notes which places hold integers that were compared and are equal."""

    def __init__(self) -> None:
        self.equal: list[tuple[Attribute, Attribute]] = []

    def find_equal(self, a: Expression, b: Expression) -> None:
        if isinstance(a, Attribute) and isinstance(b, Attribute):
            self.equal.append((a, b))


def _shapes(model: nn.Module, inputs: Inputs) -> Shapes:
    """Return the shapes, worked out without memory unless the code asks for values."""
    shapes: dict[Attribute, torch.Size] = {}
    known = KnownValues()
    state, given = known.hide_state(model), known.hide_all(inputs)
    try:
        with known, holding(model, state):
            _record_all(shapes, model, given)
    except Exception:  # values were asked for, or there is no such method: not every model has every one
        with suppress(Exception):
            _record_all(shapes, model, inputs)
    return {place: shape for place, shape in shapes.items() if _exists(model, place)}


def _record_all(shapes: dict[Attribute, torch.Size], model: nn.Module, inputs: Inputs) -> None:
    with undisturbed(model), ExitStack() as stack:
        for place, module in _described(model):
            handle = module.register_forward_hook(
                lambda module, args, output, place=place: _record(shapes, place, output)
            )
            stack.callback(handle.remove)
        features = model.forward_features(*inputs.args, **inputs.kwargs)  # type: ignore[operator]
        _record(shapes, Attribute("", "num_features"), features)
        hidden = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        _record(shapes, Attribute("", "head_hidden_size"), hidden)


def _described(model: nn.Module) -> Iterator[tuple[Attribute, nn.Module]]:
    """Yield the places in `feature_info` that count channels, with the modules that return them."""
    entries = getattr(model, "feature_info", None)
    names = dict(modules_of(model))
    for i, entry in enumerate(entries if isinstance(entries, list) else ()):
        if isinstance(entry, dict) and entry.get("module") in names and isinstance(entry.get("num_chs"), int):
            yield Attribute("", f"feature_info.{i}.num_chs"), names[entry["module"]]


def _record(shapes: dict[Attribute, torch.Size], place: Attribute, output: Any) -> None:
    if isinstance(output, Tensor):
        shapes[place] = output.shape


def _exists(model: nn.Module, place: Attribute) -> bool:
    with suppress(AttributeError, TypeError):
        return read_attribute(model, place) > 0
    return False


def _place(changed: Any) -> Attribute:
    return Attribute(changed.module, changed.name, changed.index)
