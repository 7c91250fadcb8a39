"""Fusion after a cut in depth: the layers behind a dropped branch take over what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.context import Context, Values
from secateur.core.layers import input_rows, is_matrix, set_weight_matrix, weight_matrix
from secateur.core.slots import Repair
from secateur.core.units import Kept
from secateur.errors import NotApplicable
from secateur.parts.fusion import Fused, fused
from secateur.parts.gates import Gates
from secateur.parts.granularity.depth import DepthUnits
from secateur.parts.least_squares import Moments
from secateur.parts.readers import is_shared


class Fusion(Repair):
    """Each layer behind a dropped branch becomes the best affine map to what it computed when the branch was there.

    A branch and a layer that reads the stream behind it are neighbors; one layer takes the place of both. With x what
    the layer reads now and d what it read before, z = W d + b, the change of its weight minimizes

        E|(W + D) x + b' - z|² + e |D|²:     D = W Cov(d - x, x) (Cov(x, x) + e I)^-1,   b' = b + W E[d] - (W + D) E[x]

    (Ghods et al., arXiv 2001.10509, in the place where the second layer stands, so that the network costs what it does
    without the branch). Layers are solved one after another in the order in which they run, each on what the changed
    ones before it give: two passes over the data for each, the one of the unpruned network included.

    Layers other than linear and two-dimensional convolutional ones, and layers that share their weight, stay as they
    are; those without bias cannot mend means.

    Attributes:
        ridge: e, relative to the mean variance of x.
    """

    name = "fusion"
    ridge: float = Field(1e-4, ge=0)

    def before_cut(self, context: Context, kept: Kept) -> None:
        """Let the layers behind the branches that are about to go take over; mutates their weights and biases.

        Raises:
            NotApplicable: The units are not residual branches.
            DataNeeded: There are no data.
        """
        units = context.units
        if not isinstance(units, DepthUnits):
            raise NotApplicable("Fusion repairs dropped residual branches: choose the granularity 'depth'.")
        dense = context.but(values={name: p.detach().clone() for name, p in units.model.named_parameters()})
        gates = {group: mask.to(torch.get_default_dtype()) for group, mask in kept.items()}
        for path in layers_behind(units, kept):
            layer: Any = units.model.get_submodule(path)
            moments = pair_moments(context, dense, layer, Gates(units), gates)
            if moments is not None:
                new = take_over(layer, moments, self.ridge)
                set_weight_matrix(layer, new.weight)
                if new.bias is not None:
                    with torch.no_grad():
                        layer.bias.copy_(new.bias.flatten())


def layers_behind(units: DepthUnits, kept: Kept) -> list[str]:
    """Return the paths of the layers that run behind the first dropped branch, in order; those in dropped ones not."""
    named = units.by_name(kept)
    gone = [branch for branch in units.structure.branches if branch.name in named and not named[branch.name].all()]
    inside = {tensor for branch in gone for tensor in branch.tensors}
    order = units.structure.order
    first = min(max(order.index(name) for name in branch.tensors if name in order) for branch in gone)
    paths = [name.rpartition(".")[0] for name in order[first + 1 :] if name not in inside and name.endswith(".weight")]
    return [p for p in paths if is_matrix(units.model.get_submodule(p)) and not is_shared(units.model, f"{p}.weight")]


def pair_moments(context: Context, dense: Context, layer: nn.Module, gates: Gates, values: Values) -> Moments | None:
    """Return the moments of (x, d): what a layer reads with gates, and without; None if it never runs.

    Args:
        context: The network as it is now; gives the data.
        dense: The same network with other values of its parameters, without gates.
        layer: A linear or two-dimensional convolutional layer.
        gates: Where units are multiplied.
        values: By which factors.
    """
    moments = Moments()
    for batch in context.batches():
        with context.undisturbed(), torch.inference_mode(), _read_by(layer) as seen:
            with gates.applied(values):
                context.forward(batch)
            dense.forward(batch)
        if not seen:
            return None
        calls = len(seen) // 2
        moments.add(torch.cat([torch.cat(seen[:calls], 1), torch.cat(seen[calls:], 1)], 2))
    moments.over_processes(context)
    return moments


@contextmanager
def _read_by(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Yield what a layer reads in each of its calls, as rows."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(input_rows(module, inputs[0])))
    try:
        yield seen
    finally:
        handle.remove()


def take_over(layer: Any, moments: Moments, ridge: float) -> Fused:
    """Return the best affine map from what a layer reads now to what it computed before.

    Args:
        layer: A linear or two-dimensional convolutional layer.
        moments: Of (x, d).
        ridge: See `Fusion`.
    """
    weight = weight_matrix(layer)
    bias = None if layer.bias is None else layer.bias.detach().view(weight.shape[:2])
    return fused(moments, weight, bias, ridge, toward=weight)
