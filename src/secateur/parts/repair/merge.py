"""Merging: a removed unit's readers read a kept unit of the same direction instead, without any data."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.context import Context
from secateur.core.layers import set_weight_matrix, weight_matrix
from secateur.core.slots import Repair
from secateur.core.units import Kept
from secateur.parts.filters import producers, slices
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.readers import channel_units, own_readers
from secateur.structure.inputs import undisturbed
from secateur.structure.structure import Axis


class Merge(Repair):
    """The outgoing weights of each removed unit are added to those of the kept unit that is most like it.

    With v = (weights, bias) of a unit, batch normalization folded in, a removed unit j goes to the kept unit i of the
    largest cosine between v_i and v_j. Its readers get W[:, i] += c W[:, j] with c = <v_i, v_j> / <v_i, v_i>. If v_j
    is a positive multiple of v_i and what follows is positively homogeneous (ReLU, pooling), or if v_j = v_i, nothing
    is lost at all.

    Units that several layers write together (a residual stream), and those behind other normalizations, are dropped
    without merging.

    Attributes:
        similarity: Smallest cosine at which units are merged; less similar ones are dropped.
    """

    name = "merge"
    similarity: float = Field(0.9, gt=0, le=1)

    def before_cut(self, context: Context, kept: Kept) -> None:
        """Merge into the kept units; mutates the weights of the readers of cut axes.

        Raises:
            NotApplicable: The units are not indices of axes.
        """
        units = channel_units(context.units, "Merging")
        for axis in units.structure.prunable:
            if not kept[axis.name].all():
                vectors = affine_vectors(units, axis)
                if vectors is not None:
                    self._merge(units, axis, vectors, kept[axis.name].to(vectors.device))

    def _merge(self, units: ChannelUnits, axis: Axis, vectors: Tensor, stay: Tensor) -> None:
        here, gone = stay.nonzero().flatten(), (~stay).nonzero().flatten()
        inner = vectors[gone] @ vectors[here].T
        norms = vectors.norm(dim=1)
        cosines, nearest = (inner / (norms[gone, None] * norms[None, here]).clamp_min(1e-300)).max(1)
        like = cosines >= self.similarity - 1e-12  # rounding must not tell duplicates apart
        target = here[nearest]
        factor = inner.gather(1, nearest[:, None])[:, 0] / norms[target].square().clamp_min(1e-300)
        flow = torch.zeros(axis.size, axis.size, dtype=torch.float64, device=vectors.device)
        flow[gone[like], target[like]] = factor[like]
        for reader in own_readers(units, axis):
            weight = weight_matrix(reader.layer).to(torch.float64, copy=True)
            places = reader.places(axis.size).to(weight.device)  # (units, columns of each)
            weight[..., places] += torch.einsum("gouc,uv->govc", weight[..., places], flow)
            set_weight_matrix(reader.layer, weight)


def affine_vectors(units: ChannelUnits, axis: Axis) -> Tensor | None:
    """Return (weights, bias) of each unit with batch normalization folded in, of shape (units, weights + 1).

    None where a unit is not an affine function of one layer's input.
    """
    written = producers(units, axis)
    if len(written) != 1:
        return None
    kernel, position = written[0]
    path = kernel.rpartition(".")[0]
    rows = slices(units, axis, kernel, position, units.model.get_parameter(kernel))
    vectors = _vectors(units, axis)
    bias = vectors.pop(f"{path}.bias", None)
    shift = torch.zeros_like(rows[:, :1]) if bias is None else bias
    norms = {name.rpartition(".")[0] for name in vectors}
    if not norms:
        return torch.cat([rows, shift], 1)
    norm: Any = units.model.get_submodule(next(iter(norms)))
    if len(norms) > 1 or shift.shape[1] != 1 or not _follows(units, path, norm):
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    beta = 0 if norm.bias is None else norm.bias.detach().double()[:, None]
    return torch.cat([rows * scale[:, None], (shift - norm.running_mean.double()[:, None]) * scale[:, None] + beta], 1)


def _vectors(units: ChannelUnits, axis: Axis) -> dict[str, Tensor]:
    """Return the parameters and buffers of one dim that hold an axis."""
    state: dict[str, Tensor] = {**dict(units.model.named_parameters()), **dict(units.model.named_buffers())}
    places = [(name, i) for name, i in axis.members if len(units.structure.tensors[name]) == 1]
    return {name: slices(units, axis, name, i, state[name]) for name, i in places}


def _follows(units: ChannelUnits, path: str, norm: nn.Module) -> bool:
    """Return whether a module is a batch normalization with statistics right behind another module."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return False
    seen: list[Any] = []
    handles = (
        units.model.get_submodule(path).register_forward_hook(lambda m, i, output: seen.append(output)),
        norm.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0])),
    )
    with undisturbed(units.model):
        units.model(*units.inputs.args, **units.inputs.kwargs)
    for handle in handles:
        handle.remove()
    return len(seen) == 2 and seen[0] is seen[1]
