"""A plan: which indices of which tensors remain, as plain data.

A plan is all that surgery needs, and all that a file stores: the original constructor plus the plan gives the small
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import Tensor

from secateur.errors import InvalidFile
from secateur.structure.dims import Dim


class AxisCut(BaseModel):
    """The units of one axis that remain."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: int
    kept: tuple[int, ...]


class TensorCut(BaseModel):
    """A tensor's original shape, and each dim as an expression over axes.

    An expression is the name of an axis, a number (a size that stays), or a list ``["*", ...]`` or ``["+", ...]``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[int, ...]
    dims: tuple[JsonValue, ...]


class AttributeChange(BaseModel):
    """An integer attribute of a module that has to follow the cut."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    module: str
    name: str
    index: int | None
    before: int
    after: int


class ModuleDrop(BaseModel):
    """A module whose result is no longer computed: a residual branch, or a part of one, that was dropped.

    In its place stands a module without parameters that returns zeros shaped like its first tensor argument.

    Attributes:
        module: The module's path.
        entries: The length of the tuple that it returned, of which the first entry is the zeros and the others are
            None; None if it returned a tensor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    module: str
    entries: int | None


class ConvolutionGate(BaseModel):
    """A convolution that computes, for each input, only the channels that matter for it (`structure.gated`).

    Attributes:
        convolution: The convolution's path; the gated one stands there.
        norm: The path of the batch normalization that has become a part of it; an identity stands there.
        winners: How many channels are computed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    convolution: str
    norm: str
    winners: int


class Plan(BaseModel):
    """What remains of a model; only tensors, axes and modules that the cut touches are listed.

    Attributes:
        axes: The axes that lost units.
        tensors: The parameters and buffers that become smaller.
        attributes: The integers that follow.
        dropped: The modules whose results are no longer computed.
        gated: The convolutions that choose their channels for each input.
        note: What the model's configuration cannot express, in words that are written into it; empty if nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))
    axes: dict[str, AxisCut] = {}
    tensors: dict[str, TensorCut] = {}
    attributes: tuple[AttributeChange, ...] = ()
    dropped: tuple[ModuleDrop, ...] = ()
    gated: tuple[ConvolutionGate, ...] = ()
    note: str = ""

    @property
    def smaller(self) -> bool:
        """Whether anything is physically gone."""
        return bool(self.axes or self.dropped)

    def indices(self, tensor: str) -> tuple[Tensor | None, ...]:
        """Return, for each dim of a tensor, the indices that remain; None where all do."""
        if tensor not in self.tensors:
            return ()
        return tuple(self._indices_of(expression) for expression in self.tensors[tensor].dims)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a listed tensor after the cut."""
        before = self.tensors[tensor].shape
        return tuple(n if i is None else i.numel() for n, i in zip(before, self.indices(tensor), strict=True))

    def slice(self, name: str, tensor: Tensor) -> Tensor:
        """Return the part of a tensor that remains (the tensor itself if all of it does)."""
        for position, index in enumerate(self.indices(name)):
            if index is not None:
                tensor = tensor.index_select(position, index.to(tensor.device))
        return tensor

    def slice_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part of a state dict that remains."""
        return {name: self.slice(name, tensor) for name, tensor in state.items() if not self.drops(name)}

    def drops(self, tensor: str) -> bool:
        """Return whether a tensor goes away with a dropped module."""
        return any(tensor.startswith(f"{drop.module}.") for drop in self.dropped)

    def _indices_of(self, expression: JsonValue) -> Tensor | None:
        if isinstance(expression, int):
            return None
        mask = self._mask(expression)
        return None if bool(mask.all()) else mask.nonzero().flatten()

    def _mask(self, expression: JsonValue) -> Tensor:
        if isinstance(expression, int):
            return torch.ones(expression, dtype=torch.bool)
        if isinstance(expression, str):
            return self._axis_masks[expression]
        if not isinstance(expression, list) or expression[0] not in ("*", "+"):
            raise InvalidFile(f"The plan holds an expression that makes no sense: {expression!r}.")
        masks = [self._mask(part) for part in expression[1:]]
        if expression[0] == "+":
            return torch.cat(masks)
        result = masks[0]
        for mask in masks[1:]:
            result = (result[:, None] & mask[None, :]).flatten()
        return result

    @cached_property
    def _axis_masks(self) -> dict[str, Tensor]:
        masks = {}
        for name, axis in self.axes.items():
            mask = torch.zeros(axis.size, dtype=torch.bool)
            mask[list(axis.kept)] = True
            masks[name] = mask
        return masks


def parse_plan(data: Any) -> Plan:
    """Return a plan from plain data.

    Raises:
        InvalidFile: The data are not a plan.
    """
    try:
        plan = Plan.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidFile(
            f"The file's plan is damaged at {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from error
    for name, axis in plan.axes.items():
        if not axis.kept or min(axis.kept) < 0 or max(axis.kept) >= axis.size or len(set(axis.kept)) != len(axis.kept):
            raise InvalidFile(f"The file's plan keeps units of axis {name!r} that do not exist, twice, or none.")
    return plan


def expression_of_dim(dim: Dim, names: Mapping[Dim, str]) -> JsonValue:
    """Return a dim as plain data; leaves without a name in `names` are sizes."""
    dim = dim.find()
    if not dim.op:
        return names.get(dim, dim.size)
    parts = [expression_of_dim(part, names) for part in dim.parts]
    numbers = [part for part in parts if isinstance(part, int)]
    if len(numbers) == len(parts):
        return prod(numbers) if dim.op == "*" else sum(numbers)
    return [dim.op, *parts]
