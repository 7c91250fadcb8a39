"""Indices of axes as units: channels, heads, hidden units. Pruning removes them physically, and proves it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.slots import Granularity, Scope
from secateur.core.units import Kept, Limits, Scores, Units
from secateur.structure.carry import ALONE, cut_in_place
from secateur.structure.dims import Dim, leaves, unit_index
from secateur.structure.inputs import Inputs, as_inputs, state_of
from secateur.structure.plan import Plan
from secateur.structure.prove import proved_keep, proved_structure
from secateur.structure.roles import COUNTED, ROLES, Role
from secateur.structure.settings import read_settings
from secateur.structure.structure import Axis, Structure
from secateur.structure.surgery import make_plan
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
        roles: Only axes whose units are of one of these kinds (`secateur.structure.roles.ROLES`); empty: of any.
    """

    name = "channel"
    minimum: int = Field(1, ge=1)
    round_to: Annotated[int, Field(ge=1)] | Engine = 1
    roles: tuple[Role, ...] = ()

    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> ChannelUnits:
        """Return the units of all free axes in scope."""
        multiple = MULTIPLES[self.round_to] if isinstance(self.round_to, str) else self.round_to
        return ChannelUnits(model, as_inputs(example_inputs), scope, self.minimum, multiple, self.roles)


class ChannelUnits(Units):
    """The free axes of a model.

    Attributes:
        structure: The structure of `model` as it is now.
        dense_structure: The structure before the first cut.
        proofs: One verification per cut.
        companions: What follows the model through its cuts.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        scope: Scope,
        minimum: int = 1,
        multiple: int = 1,
        roles: Collection[Role] = (),
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.roles = roles or ROLES.keys()
        structure = proved_structure(model, inputs)
        others = {
            a.name: f"not asked for: its role is {a.role!r}" for a in structure.prunable if a.role not in self.roles
        }
        self.dense_structure = self.structure = _in_scope(structure, scope).frozen(others)
        counted = frozenset(axis.name for axis in self.structure.prunable if axis.role in COUNTED)
        self.limits = Limits(minimum, multiple, counted, self.structure.ties, self.structure.steps)
        self.proofs: list[Verification] = []
        self.companions = ALONE
        self._settings = read_settings(model)
        self._kept = {axis.name: torch.ones(axis.size, dtype=torch.bool) for axis in self.structure.prunable}

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """One vector per free axis."""
        return {axis.name: torch.Size([axis.size]) for axis in self.structure.prunable}

    @property
    def plan(self) -> Plan:
        """What remains of the unpruned model."""
        return make_plan(self.dense_structure, self._kept)

    def finish(self, small: nn.Module) -> Plan:
        """Return what remains, after letting the configuration of the final network say so; mutates `small`."""
        if self._settings is None or not self.plan.axes:
            return self.plan
        return self._settings.state(small, self.dense_structure, self.plan)

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
        device = next(iter(values.values())).device
        return {axis.name: self._sum_over(axis, values, consumed).to(device) for axis in self.structure.prunable}

    def _sum_over(self, axis: Axis, values: Mapping[str, Tensor], consumed: bool) -> Tensor:
        places = [(name, position) for name, position in axis.members if name in values]
        if consumed:
            places = [place for place in places if self._consumes(*place)] or places
        total = torch.zeros(axis.size, dtype=next(iter(values.values())).dtype)
        for name, position in places:
            value = values[name]
            others = [i for i in range(value.dim()) if i != position]
            vector = value.sum(others) if others else value
            index = unit_index(self.structure.tensors[name][position], axis.leaf)
            inside = index >= 0
            total.index_add_(0, index[inside], vector.cpu()[inside])
        return total

    def _consumes(self, name: str, position: int) -> bool:
        """Return whether an operation sums over this dim of this parameter."""
        consumed = self.structure.consumers.get(name, ())
        dim = self.structure.tensors[name][position]
        same = [d for d in self.structure.tensors[name] if any(d is c for c in consumed)]
        if same:
            return any(dim is d for d in same)
        return any(leaf in _free(c) for c in consumed for leaf in _free(dim))

    def keep(self, kept: Kept) -> bool:
        """Cut everything else off in place, and prove that the result computes what the masked network computes.

        Returns:
            Whether that is so. If not, nothing is cut, and the axes that are to blame are frozen.
        """
        proof, structure = proved_keep(self.model, self.structure, kept)
        if not proof.ok:
            self._freeze(structure)
            return False
        self.proofs.append(proof)
        for name, mask in kept.items():
            self._kept[name][self._kept[name].clone()] = mask.cpu()
        cut_in_place(self.model, make_plan(structure, kept), self.companions)
        self.structure = structure.cut(kept)
        return True

    def _freeze(self, structure: Structure) -> None:
        """Take over what a failed proof has frozen."""
        frozen = {axis.name: axis.reason for axis in structure.axes if not axis.prunable}
        self.structure = structure
        self.dense_structure = self.dense_structure.frozen(frozen)
        self.limits = replace(self.limits, ties=structure.ties)

    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Load the remaining part of a state dict of the unpruned model."""
        first_name = {id(tensor): name for name, tensor in state_of(self.model).items()}
        own: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        own |= dict(self.model.named_buffers(remove_duplicate=False))
        plan = self.plan
        self.model.load_state_dict(
            {
                name: plan.slice(first_name[id(own[name])], tensor) if name in own else tensor
                for name, tensor in state.items()
            }
        )


def _free(dim: Dim) -> Iterator[Dim]:
    return (leaf for leaf in leaves(dim) if leaf.size > 1)


def _in_scope(structure: Structure, scope: Scope) -> Structure:
    outside = {axis.name: "outside the scope" for axis in structure.prunable if not scope.admits(axis.name)}
    return structure.frozen(outside)
