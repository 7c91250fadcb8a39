"""Least-squares compensation: the layers that read what is cut reproduce their outputs from what stays."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.context import Context
from secateur.core.layers import set_weight_matrix, weight_matrix
from secateur.core.slots import Repair
from secateur.core.units import Kept
from secateur.parts.least_squares import Moments, input_moments, regression
from secateur.parts.readers import channel_units, kept_columns


class LeastSquares(Repair):
    """Every layer that loses inputs gets the weights and the bias that reproduce its output best from the others.

    With x = (kept k, removed r) and z = W x + b, the change of the kept columns minimizes

        E|(W_k + D) k + b' - z|² + e |D|²:     D = W_r Cov(r, k) (Cov(k, k) + e I)^-1,   b' = b + W_r E[r] - D E[k]

    that is, removed inputs are predicted linearly from kept ones. A layer without bias cannot mend means: moments
    about zero take the place of covariances. One pass over the data through the uncut network; for each layer a matrix
    of (inputs x kernel entries)² numbers. A grouped convolution is solved group by group.

    Layers other than linear and two-dimensional convolutional ones, and layers that share their weight, stay as they
    are. Where a normalization runs over cut units (LayerNorm), what its readers see after the cut is not what they saw
    before, and the solution is approximate.

    Attributes:
        ridge: e, relative to the mean variance of the kept inputs.
    """

    name = "least-squares"
    ridge: float = Field(1e-6, ge=0)

    def before_cut(self, context: Context, kept: Kept) -> None:
        """Compensate for the removed inputs; mutates the weights and biases of their readers.

        Raises:
            NotApplicable: The units are not indices of axes.
            DataNeeded: There are no data.
        """
        columns = kept_columns(channel_units(context.units, "Least-squares compensation"), kept)
        for name, moments in input_moments(context, columns).items():
            layer = context.model.get_submodule(name.rpartition(".")[0])
            compensate(layer, moments, columns[name], self.ridge)


def compensate(layer: Any, moments: Moments, stay: Tensor, ridge: float) -> None:
    """Change a layer so that it reproduces its output from some of its inputs; mutates its kept columns and its bias.

    Args:
        layer: A linear or two-dimensional convolutional layer.
        moments: Of its inputs.
        stay: Which columns of its weight stay.
        ridge: See `LeastSquares`.
    """
    stay = stay.to(moments.mean.device)
    weight = weight_matrix(layer).to(torch.float64, copy=True)
    spread = moments.second if layer.bias is None else moments.covariance
    removed = weight[:, :, ~stay]
    change = regression(removed @ spread[:, ~stay][:, :, stay], spread[:, stay][:, :, stay], ridge)
    weight[:, :, stay] += change
    set_weight_matrix(layer, weight)
    if layer.bias is not None:
        mean = moments.mean[:, :, None]
        shift = removed @ mean[:, ~stay] - change @ mean[:, stay]
        with torch.no_grad():
            layer.bias += shift.flatten().to(layer.bias)
