"""Contributions: what each unit adds to the outputs of the layers that read it, as inner products between units."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.context import Context
from secateur.core.layers import weight_matrix
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.least_squares import input_moments
from secateur.parts.readers import Reader, readers
from secateur.structure.structure import Axis


class Contributions:
    """Second moments of what the units of each axis add to the outputs z = W x of their readers.

    Unit j adds W_j x_j, so that removing a set T of units changes a reader's outputs by the squared error

        E|sum of W_j x_j over T|² = sum of G_jk over j, k in T,     G_jk = <W_jᵀ W_k, E[x_j x_kᵀ]>

    Whatever is asked of reconstruction follows from the matrix G: no activations are kept. One pass over the data; for
    each reader a matrix of (inputs x kernel entries)² numbers.

    Args:
        context: Gives the data and the weights.
        units: Its units.

    Raises:
        NotApplicable: An axis that no linear or two-dimensional convolutional layer reads.
        DataNeeded: There are no data.
    """

    def __init__(self, context: Context, units: ChannelUnits) -> None:
        self._weights = context.weights
        self._readers = {axis.name: _readers(units, axis) for axis in units.structure.prunable}
        self._axes = {axis.name: axis for axis in units.structure.prunable}
        self._moments = input_moments(context, {r.name for found in self._readers.values() for r in found})

    def gram(self, axis: str) -> Tensor:
        """Return G of an axis, each reader's in units of E|W x|², the power of its output: shape (units, units)."""
        size = self._axes[axis].size
        total = torch.zeros(size, size, dtype=torch.float64)
        for reader in self._readers[axis]:
            weight = weight_matrix(reader.layer, self._weights[reader.name]).double()
            products = (weight.mT @ weight * self._moments[reader.name].second).sum(0).cpu()
            power = products.sum()
            if power > 0:
                total += _over_units(products / power, reader.units, size)
        return total

    def norms(self, axis: str) -> Tensor:
        """Return |W_j| of each unit, over all readers, each in units of the power of its output: shape (units,)."""
        size = self._axes[axis].size
        squares = torch.zeros(size, dtype=torch.float64)
        for reader in self._readers[axis]:
            weight = weight_matrix(reader.layer, self._weights[reader.name]).double()
            power = (weight.mT @ weight * self._moments[reader.name].second).sum().cpu()
            own = reader.units >= 0
            if power > 0:
                squares.index_add_(0, reader.units[own], weight.square().sum((0, 1)).cpu()[own] / power)
        return squares.sqrt()


def _readers(units: ChannelUnits, axis: Axis) -> list[Reader]:
    found = readers(units, axis)
    if not found:
        raise NotApplicable(
            f"No linear or two-dimensional convolutional layer reads the axis {axis.name!r}, so that nothing can be "
            "reconstructed. Exclude it from the scope."
        )
    return found


def _over_units(values: Tensor, index: Tensor, size: int) -> Tensor:
    """Return sums of the entries of a square matrix over the pairs of units that they belong to; -1 is none."""
    own = index >= 0
    rows = values.new_zeros(size, values.shape[1]).index_add_(0, index[own], values[own])
    return values.new_zeros(size, size).index_add_(1, index[own], rows[:, own])
