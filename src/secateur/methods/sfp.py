"""Soft filter pruning: while the network trains, the smallest filters are set to zero, and may grow again.

He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Kept, Scores, Units
from secateur.parts.readers import channel_units
from secateur.structure.dims import unit_index


class SoftFilterPruning(Criterion):
    """The L2 norm of a unit's filters: the slices of the kernels that produce it.

    Attributes:
        times: How often filters are set to zero in the training before a cut, in equal distances, last right before
            it; the paper does it after each epoch.
    """

    name = "sfp"
    learns = True
    times: int = Field(10, ge=1)

    def hooks(self, run: Run) -> Hooks:
        """Return what sets filters to zero."""
        return _SoftPruning(run, self.times)

    def score(self, context: Context) -> Scores:
        """Return the norms as they are now."""
        return filter_norms(context.units)


class _SoftPruning(Hooks):
    def __init__(self, run: Run, times: int) -> None:
        filter_norms(run.units)  # refuses the network before it is trained
        self._run, self._times = run, times

    def after_step(self, state: TrainingState) -> None:
        if self._run.next_level is None:
            return
        done, length = state.step - state.first_step, state.last_step - state.first_step
        if done * self._times // length > (done - 1) * self._times // length:
            zero_filters(self._run.units, self._run.choose(filter_norms(self._run.units)))


class _Filters(NamedTuple):
    """A kernel that produces units of a group, along one of its dims."""

    kernel: nn.Parameter
    dim: int
    group: str
    unit: Tensor
    """For each index of the dim; -1 for those of other groups."""


def _filters(units: Units) -> Iterator[_Filters]:
    channels = channel_units(units, "Soft filter pruning")
    parameters = channels.parameters()
    for axis in channels.structure.prunable:
        for name, dim in axis.members:
            dims = channels.structure.tensors[name]
            if name in parameters and len(dims) > 1 and not channels.consumes(name, dim):
                yield _Filters(parameters[name], dim, axis.name, unit_index(dims[dim], axis.leaf))


@torch.no_grad()
def filter_norms(units: Units) -> Scores:
    """Return the L2 norm of all filters of each unit."""
    squares = {group: torch.zeros(shape) for group, shape in units.shapes.items()}
    for kernel, dim, group, unit in _filters(units):
        values = kernel.square().sum([i for i in range(kernel.dim()) if i != dim]).cpu().to(squares[group])
        squares[group].index_add_(0, unit[unit >= 0], values[unit >= 0])
    return {group: square.sqrt() for group, square in squares.items()}


@torch.no_grad()
def zero_filters(units: Units, kept: Kept) -> None:
    """Set the filters of all units but `kept` to zero; what reads them stays, so that they can grow again."""
    for kernel, dim, group, unit in _filters(units):
        gone = (unit >= 0) & ~kept[group].cpu()[unit.clamp_min(0)]
        kernel.index_fill_(dim, gone.nonzero().flatten().to(kernel.device), 0)


METHOD = Method("sfp", Recipe(criterion=SoftFilterPruning(), allocation="uniform", schedule=OneShot(at=0.5)))
