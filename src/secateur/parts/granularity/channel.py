"""Indices of axes as units: channels, heads, hidden units. Pruning removes them physically, and proves it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.slots import Granularity, Scope
from secateur.core.units import Kept, Limits, Scores
from secateur.parts.granularity.cut import CutUnits
from secateur.structure.dims import Dim, leaves, unit_index
from secateur.structure.inputs import Inputs, as_inputs
from secateur.structure.plan import Plan
from secateur.structure.prove import proved, proved_with_the_analysis
from secateur.structure.roles import COUNTED, ROLES, Role
from secateur.structure.structure import Axis, Structure
from secateur.structure.trace import trace
from secateur.structure.verify import Verification

Engine = Literal["eager", "onnxruntime", "openvino"]

MULTIPLES: dict[Engine, int] = {"eager": 16, "onnxruntime": 16, "openvino": 16}
"""The widths that engines like, as multiples.

Measured on an AMD CPU with one thread, widths of 16 n against 16 n - 1, which is less work: the odd ones took 37 to
49 % more time in ONNX Runtime 1.31 and 5 to 15 % more in OpenVINO 2026.4 (ResNet-50), and up to 10 % more in PyTorch
eager (ViT-S and BERT, batch 16). Multiples other than 16 were not measured.
"""


class Channel(Granularity):
    """Each index of each free axis is a unit, with every slice of every tensor that belongs to it (structured pruning).

    Attributes:
        minimum: Fewest units that stay on each axis.
        round_to: Widths end at multiples of this, or whole, because some engines are slow on odd widths: a number, or
            the name of an engine for the multiple that it likes. Numbers of heads and of experts are not rounded.
        roles: Only axes whose units are of one of these kinds (`secateur.structure.roles.ROLES`); empty: of any but
            ``expert``. Each row goes through as many experts as before, so that a budget in MACs would remove them for
            nothing.
    """

    name = "channel"
    minimum: int = Field(1, ge=1)
    round_to: Annotated[int, Field(ge=1)] | Engine = 1
    roles: tuple[Role, ...] = ()

    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> ChannelUnits:
        """Return the units of all free axes in scope."""
        multiple = MULTIPLES[self.round_to] if isinstance(self.round_to, str) else self.round_to
        return ChannelUnits(model, as_inputs(example_inputs), scope, self.minimum, multiple, self.roles)


class ChannelUnits(CutUnits):
    """The free axes of a model."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        scope: Scope,
        minimum: int = 1,
        multiple: int = 1,
        roles: Collection[Role] = (),
    ) -> None:
        self.roles = roles or ROLES.keys() - {"expert"}
        found = trace(model, inputs)
        others = {a.name: f"not asked for: its role is {a.role!r}" for a in found.prunable if a.role not in self.roles}
        self.structure = structure = _in_scope(found, scope).frozen(others)
        counted = frozenset(axis.name for axis in structure.prunable if axis.role in COUNTED)
        limits = Limits(minimum, multiple, counted, structure.ties, structure.steps, structure.least)
        super().__init__(model, inputs, structure, limits)
        self._proved = False

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """One vector per free axis."""
        return {axis.name: torch.Size([axis.size]) for axis in self.structure.prunable}

    def obstacles(self) -> list[str]:
        """Return why the axes of the asked roles are frozen."""
        asked = [axis for axis in self.structure.axes if axis.role in self.roles]
        if not asked:
            return [f"it has no axis of the role {' or '.join(map(repr, self.roles))}"]
        return sorted({axis.reason for axis in asked if axis.reason})

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters that hold a free axis."""
        held = {name for axis in self.structure.prunable for name, _ in axis.members}
        return {name: parameter for name, parameter in self.model.named_parameters() if name in held}

    def sum(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Return sums over each unit's slices.

        With `consumed`, only over slices that sum over the axis (a gate at every consumer would see exactly these).
        An axis that no parameter consumes (query and key are multiplied with each other) is taken at its producers
        instead.
        """
        places = {axis.name: self._places(axis, values, consumed) for axis in self.structure.prunable}
        positions: dict[str, set[int]] = defaultdict(set)
        for name, position in (place for found in places.values() for place in found):
            positions[name].add(position)
        vectors: dict[tuple[str, int], Tensor] = {}
        for name, value in values.items():  # each of them once: they may be worked out on the way
            kind, device = value.dtype, value.device
            for position in positions[name]:
                others = [i for i in range(value.dim()) if i != position]
                vectors[name, position] = (value.sum(others) if others else value).cpu()
        sums: Scores = {}
        for axis in self.structure.prunable:
            total = torch.zeros(axis.size, dtype=kind)
            for name, position in places[axis.name]:
                index = unit_index(self.structure.tensors[name][position], axis.leaf)
                inside = index >= 0
                total.index_add_(0, index[inside], vectors[name, position][inside])
            sums[axis.name] = total.to(device)
        return sums

    def _places(self, axis: Axis, values: Mapping[str, Tensor], consumed: bool) -> list[tuple[str, int]]:
        """Return the tensors and dims whose entries count for an axis."""
        places = [(name, position) for name, position in axis.members if name in values]
        return ([place for place in places if self.consumes(*place)] or places) if consumed else places

    def consumes(self, name: str, position: int) -> bool:
        """Return whether an operation sums over this dim of this parameter."""
        consumed = self.structure.consumers.get(name, ())
        dim = self.structure.tensors[name][position]
        same = [d for d in self.structure.tensors[name] if any(d is c for c in consumed)]
        if same:
            return any(dim is d for d in same)
        return any(leaf in _free(c) for c in consumed for leaf in _free(dim))

    def by_name(self, kept: Kept) -> Kept:
        """Return the selection itself: groups are axes."""
        return {name: mask.cpu() for name, mask in kept.items()}

    def kept_in(self, plan: Plan) -> Kept:
        """Return which units of each axis a plan keeps."""
        kept = self.whole()
        for name, axis in plan.axes.items():
            kept[name] = torch.zeros(axis.size, dtype=torch.bool).index_fill_(0, torch.tensor(axis.kept), True)
        return kept

    def prove(self, kept: Kept) -> tuple[Verification, Structure]:
        """Return the proof of a cut; the first one proves the analysis of all axes, too, if nothing has done so yet.

        If it fails, each axis is proved, and those that fail are frozen.
        """
        if not self._proved:
            proof = proved_with_the_analysis(self.model, self.structure, kept)
            if proof is not None:
                self._proved = True
                return proof, self.structure
            self.prove_analysis()
            if any(not bool(mask.all()) for name, mask in kept.items() if name not in self.shapes):
                return Verification(float("inf"), ok=False), self.structure
        return super().prove(kept)

    def prove_analysis(self) -> None:
        """Freeze the axes that cannot be proved."""
        self.freeze(proved(self.model, self.structure))
        self._proved = True

    def structure_after(self, structure: Structure, kept: Kept) -> Structure:
        """Return the structure with shorter axes."""
        return structure.cut(kept)


def _free(dim: Dim) -> Iterator[Dim]:
    return (leaf for leaf in leaves(dim) if leaf.size > 1)


def _in_scope(structure: Structure, scope: Scope) -> Structure:
    outside = {axis.name: "outside the scope" for axis in structure.prunable if not scope.admits(axis.name)}
    return structure.frozen(outside)
