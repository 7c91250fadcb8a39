"""Statistics over a dim of which some units are absent: what an operation computes is restricted to those that remain.

For every other operation it is enough to put a value that does not count in the place of an absent unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

Masks = Mapping[int, Tensor]
"""Position of a dim -> which of its indices are kept."""


def along(mask: Tensor, position: int, x: Tensor) -> Tensor:
    """Return a mask shaped so that it broadcasts along one dim of x."""
    return mask.to(x.device).view([-1 if i == position else 1 for i in range(x.dim())])


def _weights(x: Tensor, masks: Masks) -> Tensor:
    """Return 1 for kept and 0 for removed entries, broadcastable to x."""
    weight = torch.ones([1] * x.dim(), dtype=x.dtype, device=x.device)
    for position, mask in masks.items():
        weight = weight * along(mask, position, x).to(x.dtype)
    return weight


def _restricted_moments(x: Tensor, masks: Masks, positions: list[int]) -> tuple[Tensor, Tensor, float]:
    """Return mean and (biased) variance over `positions` of the kept entries, dims kept, and their number."""
    weight = _weights(x, masks)
    total = prod(int(masks[p].sum()) if p in masks else x.shape[p] for p in positions)
    mean = (x * weight).sum(positions, keepdim=True) / total
    variance = ((x - mean).square() * weight).sum(positions, keepdim=True) / total
    return mean, variance, total


def _layer_norm(bound: dict[str, Any], masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = bound["input"], bound["weight"], bound["bias"]
    positions = list(range(x.dim() - len(bound["normalized_shape"]), x.dim()))
    mean, variance, _ = _restricted_moments(x, masks, positions)
    scale = (variance + bound["eps"]).rsqrt()
    y = (x - mean) * scale
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, scale


def _batch_norm(bound: dict[str, Any], masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
    x = bound["input"]
    mean, variance, _ = _restricted_moments(x, masks, [i for i in range(x.dim()) if i != 1])
    scale = (variance + bound["eps"]).rsqrt()
    y = (x - mean) * scale
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y if bound["weight"] is None else y * bound["weight"].view(shape)
    y = y if bound["bias"] is None else y + bound["bias"].view(shape)
    return y, mean.flatten(), scale.flatten()


def _rms_norm(bound: dict[str, Any], masks: Masks) -> tuple[Tensor, Tensor]:
    x, weight = bound["input"], bound["weight"]
    positions = list(range(x.dim() - len(bound["normalized_shape"]), x.dim()))
    total = prod(int(masks[p].sum()) if p in masks else x.shape[p] for p in positions)
    eps = bound["eps"] if bound["eps"] is not None else torch.finfo(x.dtype).eps
    scale = ((x.square() * _weights(x, masks)).sum(positions, keepdim=True) / total + eps).rsqrt()
    return (x * scale if weight is None else x * scale * weight), scale


def _group_norm(bound: dict[str, Any], masks: Masks) -> tuple[Tensor, Tensor, Tensor]:
    x, groups = bound["input"], bound["group"]
    parts = x.reshape(x.shape[0], groups, -1)
    weight = _weights(x, masks).expand_as(x).reshape(parts.shape)
    total = weight.sum(2, keepdim=True).clamp_min(1)  # a group that is cut whole is never consumed
    mean = (parts * weight).sum(2, keepdim=True) / total
    variance = ((parts - mean).square() * weight).sum(2, keepdim=True) / total
    scale = (variance + bound["eps"]).rsqrt()
    y = ((parts - mean) * scale).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    y = y if bound["weight"] is None else y * bound["weight"].view(shape)
    y = y if bound["bias"] is None else y + bound["bias"].view(shape)
    return y, mean.squeeze(2), scale.squeeze(2)


def _reduced_positions(bound: dict[str, Any]) -> list[int]:
    x, dim = bound["self"], bound.get("dim")
    if dim is None or dim == []:
        return list(range(x.dim()))
    return [p % x.dim() for p in ([dim] if isinstance(dim, int) else dim)]


def _squeezed(value: Tensor, bound: dict[str, Any], positions: list[int]) -> Tensor:
    return value if bound.get("keepdim") else value.squeeze(positions)


def _mean(bound: dict[str, Any], masks: Masks) -> Tensor:
    positions = _reduced_positions(bound)
    return _squeezed(_restricted_moments(bound["self"], masks, positions)[0], bound, positions)


def _variance(bound: dict[str, Any], masks: Masks) -> tuple[Tensor, Tensor]:
    positions = _reduced_positions(bound)
    mean, variance, total = _restricted_moments(bound["self"], masks, positions)
    correction = bound.get("correction")
    if correction is None:
        correction = 1 if bound.get("unbiased", True) else 0
    variance = variance * (total / max(total - correction, 1e-12))
    return _squeezed(variance, bound, positions), _squeezed(mean, bound, positions)


REFERENCES: Mapping[str, Callable[[dict[str, Any], Masks], Any]] = {
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "native_group_norm": _group_norm,
    "mean": _mean,
    "var": lambda bound, masks: _variance(bound, masks)[0],
    "std": lambda bound, masks: _variance(bound, masks)[0].sqrt(),
    "var_mean": _variance,
    "std_mean": lambda bound, masks: (_variance(bound, masks)[0].sqrt(), _variance(bound, masks)[1]),
}
"""What such an operation computes, by its name, of its arguments and of the masks of the one that is reduced."""
