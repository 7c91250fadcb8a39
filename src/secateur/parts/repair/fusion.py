"""Fusion after a cut in depth: the layers behind a dropped branch take over what it did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.context import Context, Values
from secateur.core.layers import input_rows, is_matrix, output_rows, set_weight_matrix, weight_matrix
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
    the layer reads now and z what it computed before, the change of its weight minimizes

        E|(W + D) x + b - z|² + e |D|²:   D = (Cov(z, x) - W Cov(x, x)) (Cov(x, x) + e I)^-1,  b = E[z] - (W + D) E[x]

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
    """Return the moments of (x, z): what a layer reads with gates, and what it computes without; None if it never runs.

    Args:
        context: The network as it is now; gives the data.
        dense: The same network with other values of its parameters, without gates.
        layer: A linear or two-dimensional convolutional layer.
        gates: Where units are multiplied.
        values: By which factors.
    """
    moments = Moments()
    for batch in context.batches():
        with context.undisturbed(), torch.inference_mode(), _passing(layer) as seen:
            with gates.applied(values):
                context.forward(batch)
            dense.forward(batch)
        if not seen:
            return None
        calls = len(seen) // 2
        read = torch.cat([input_rows(layer, x) for x, _ in seen[:calls]], 1)
        computed = torch.cat([output_rows(layer, z) for _, z in seen[calls:]], 1)
        moments.add(torch.cat([read, computed], 2))
    moments.over_processes(context)
    return moments


@contextmanager
def _passing(layer: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield input and output of a layer in each of its calls, as they come."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda module, inputs, z: seen.append((inputs[0].clone(), z.clone())))
    try:
        yield seen
    finally:
        handle.remove()


def take_over(layer: Any, moments: Moments, ridge: float) -> Fused:
    """Return the best affine map from what a layer reads now to what it computed before.

    Args:
        layer: A linear or two-dimensional convolutional layer.
        moments: Of (x, z).
        ridge: See `Fusion`.
    """
    weight = weight_matrix(layer).double()
    groups, outputs, _ = weight.shape
    itself = torch.eye(outputs).to(weight).expand(groups, -1, -1)
    bias = None if layer.bias is None else weight.new_zeros(groups, outputs)
    return fused(moments, itself, bias, ridge, toward=weight)
