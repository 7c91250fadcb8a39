"""Rescaling: what is left of each layer is brought back to the edge of chaos."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.core.context import Context, Values
from secateur.core.slots import Repair
from secateur.structure.trace import trace

Per = Literal["layer", "unit"]


class Rescale(Repair):
    """Kernels are multiplied so that the energy into their units is sigma_w² again, of which a mask takes a part.

    Hayou, Ton, Doucet, Teh: Robust Pruning at Initialization, ICLR 2021 (arXiv 2002.08797). Signals and gradients then
    neither die out nor explode with depth. This is for cuts before training; where a normalization follows, what the
    network computes stays the same.

    Attributes:
        sigma_w: The energy's root: sqrt(2) for ReLU; for others see `secateur.parts.mean_field.edge_of_chaos`.
        per: One factor for each ``layer``, or for each output ``unit``.
        stable: Divide residual branches by the root of their number, at the last layer of each (a stable ResNet). This
            comes with every cut: with several of them let the weights be set back.
    """

    name = "rescale"
    sigma_w: float = Field(math.sqrt(2), gt=0)
    per: Per = "layer"
    stable: bool = False

    def after_cut(self, context: Context) -> None:
        """Multiply the weights; mutates the model."""
        parameters = dict(context.model.named_parameters())
        with torch.no_grad():
            for name, value in at_edge_of_chaos(context, self.sigma_w, self.per, self.stable).items():
                parameters[name].copy_(value)


def at_edge_of_chaos(context: Context, sigma_w: float, per: Per = "layer", stable: bool = False) -> Values:
    """Return the values that the parameters have at the edge of chaos, by name; those that stay are left out.

    Linear and convolutional kernels get the energy sigma_w² = N mean(W²), N the number of weights into a unit, zeros
    counted. Biases and normalizations stay as they are.
    """
    kernels = [(f"{path}.weight" if path else "weight", module) for path, module in context.model.named_modules()]
    values = {
        name: _with_energy(context.weights[name], module, sigma_w**2, per)
        for name, module in kernels
        if isinstance(module, nn.Linear | _ConvNd) and name in context.weights
    }
    if stable:
        parameters = dict(context.model.named_parameters())
        branches = trace(context.model, context.units.inputs).branches
        for name in {name for branch in branches for name in branch.gate}:
            values[name] = values.get(name, parameters[name].detach()) / math.sqrt(len(branches))
    return values


def _with_energy(weight: Tensor, module: nn.Module, energy: float, per: Per) -> Tensor:
    """Return a multiple of a kernel, or of its rows, with this sum of squares into each unit; what is zero stays so."""
    rows = weight.transpose(0, 1) if isinstance(module, _ConvTransposeNd) else weight
    found = rows.flatten(1).square().sum(1)
    found = found.mean().expand_as(found) if per == "layer" else found
    factors = torch.where(found > 0, (energy / found).sqrt(), 1)
    scaled = rows * factors.view(-1, *[1] * (rows.dim() - 1))
    return scaled.transpose(0, 1) if isinstance(module, _ConvTransposeNd) else scaled
