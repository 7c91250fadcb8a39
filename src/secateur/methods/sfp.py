"""Soft filter pruning: while the network trains, the smallest filters are set to zero, and may grow again.

He, Kang, Dong, Fu, Yang: Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks, IJCAI 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

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
    """Sets filters to zero now and then.

    Batch normalization divides the gradient of a filter by the deviation of its output. For a zero filter that leaves
    1 / sqrt(eps), 316 times too much: in one step it would outgrow all others and push the learned ones out of the next
    selection. So the gradient of what was zeroed is at most as long as the longest of the other filters.
    """

    def __init__(self, run: Run, times: int) -> None:
        _channels(run.units)  # refuses the network before it is trained
        self._run, self._times = run, times
        self._kept: Kept = {}

    @torch.no_grad()
    def after_backward(self, state: TrainingState) -> None:
        if self._run.next_level is None or not self._kept:
            return
        weights = self._run.units.parameters()
        for name, dim, places in _places(self._run.units, self._kept):
            gradient = weights[name].grad
            if gradient is None or not 0 < len(places) < gradient.shape[dim]:
                continue
            norms = gradient.transpose(0, dim).flatten(1).norm(dim=1)
            longest = norms.index_fill(0, places, 0).max()
            factors = torch.ones_like(norms).index_copy(0, places, (longest / norms[places]).clamp(max=1).nan_to_num(1))
            gradient.mul_(factors.view(-1, *(1,) * (gradient.dim() - 1 - dim)))

    def after_step(self, state: TrainingState) -> None:
        if self._run.next_level is None:
            return
        done, length = state.step - state.first_step, state.last_step - state.first_step
        if done * self._times // length > (done - 1) * self._times // length:
            self._kept = self._run.choose(filter_norms(self._run.units))
            zero_filters(self._run.units, self._kept)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept = dict(state["kept"])


@torch.no_grad()
def filter_norms(units: Units) -> Scores:
    """Return the L2 norm of all filters of each unit."""
    channels = _channels(units)
    weights = channels.parameters()
    return {axis.name: filters(channels, axis, weights).norm(dim=1).float() for axis in channels.structure.prunable}


@torch.no_grad()
def zero_filters(units: Units, kept: Kept) -> None:
    """Set the filters of all units but `kept` to zero; what reads them stays, so that they can grow again."""
    weights = units.parameters()
    for name, dim, places in _places(units, kept):
        weights[name].index_fill_(dim, places, 0)


def _places(units: Units, kept: Kept) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the weights that have filters of units but `kept`, the dim that counts them, and their places there."""
    channels = _channels(units)
    weights = channels.parameters()
    for axis in channels.structure.prunable:
        gone = ~kept[axis.name].cpu()
        for name, dim in producers(channels, axis):
            unit = unit_index(channels.structure.tensors[name][dim], axis.leaf)
            places = (unit >= 0) & gone[unit.clamp_min(0)]
            yield name, dim, places.nonzero().flatten().to(weights[name].device)


def _channels(units: Units) -> ChannelUnits:
    return channel_units(units, "Soft filter pruning")


METHOD = Method("sfp", Recipe(criterion=SoftFilterPruning(), allocation="uniform", schedule=OneShot(at=0.5)))
