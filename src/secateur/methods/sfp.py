"""Soft filter pruning: while the network trains, the smallest filters are set to zero, and may grow again.

He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018.
"""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Kept, Scores, Units
from secateur.parts.filters import filters, producers
from secateur.parts.granularity.channel import ChannelUnits
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
        _channels(run.units)  # refuses the network before it is trained
        self._run, self._times = run, times

    def after_step(self, state: TrainingState) -> None:
        if self._run.next_level is None:
            return
        done, length = state.step - state.first_step, state.last_step - state.first_step
        if done * self._times // length > (done - 1) * self._times // length:
            zero_filters(self._run.units, self._run.choose(filter_norms(self._run.units)))


@torch.no_grad()
def filter_norms(units: Units) -> Scores:
    """Return the L2 norm of all filters of each unit."""
    channels = _channels(units)
    weights = channels.parameters()
    return {axis.name: filters(channels, axis, weights).norm(dim=1).float() for axis in channels.structure.prunable}


@torch.no_grad()
def zero_filters(units: Units, kept: Kept) -> None:
    """Set the filters of all units but `kept` to zero; what reads them stays, so that they can grow again."""
    channels = _channels(units)
    weights = channels.parameters()
    for axis in channels.structure.prunable:
        gone = ~kept[axis.name].cpu()
        for name, dim in producers(channels, axis):
            unit = unit_index(channels.structure.tensors[name][dim], axis.leaf)
            places = (unit >= 0) & gone[unit.clamp_min(0)]
            weights[name].index_fill_(dim, places.nonzero().flatten().to(weights[name].device), 0)


def _channels(units: Units) -> ChannelUnits:
    return channel_units(units, "Soft filter pruning")


METHOD = Method("sfp", Recipe(criterion=SoftFilterPruning(), allocation="uniform", schedule=OneShot(at=0.5)))
