"""The reference that a cut network is compared with: the dense network with units absent where they are consumed.

The dense model runs unchanged; wherever an operation combines all indices of a cut dim, the entries of removed
units are replaced by the value that does not count (0 for sums, -inf for maxima and softmax), and where a statistic
is taken over the dim (LayerNorm, a mean), it is restricted to the kept units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import StructureError
from secateur.structure.attention import opened_attention
from secateur.structure.dims import mask_under
from secateur.structure.inputs import Inputs, call_with_state
from secateur.structure.operations import bind, operation_name, rebind
from secateur.structure.structure import Kept, Structure

Masks = dict[int, Tensor]
"""Position of a dim -> which of its indices are kept."""
Reference = Callable[[dict[str, Any], Masks], Any]


def run_masked(model: nn.Module, structure: Structure, kept: Kept, state: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Return the output of the dense model with the given state when only the `kept` units take part.

    Raises:
        StructureError: The model took another path than when it was traced.
    """
    with opened_attention(model), _MaskedMode(structure, kept):
        return call_with_state(model, state, inputs)


class _MaskedMode(TorchDispatchMode):
    def __init__(self, structure: Structure, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.structure = structure
        self.masks = structure.masks(kept)
        self.consuming = {name for name, _ in structure.path}
        self.rest = iter(structure.path)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name not in self.consuming:
            return func(*args, **kwargs)
        expected, sites = next(self.rest, ("the end", ()))
        if expected != name:
            raise StructureError(
                f"The model took another path than when it was traced ({name} instead of {expected}). "
                "Its control flow depends on values, so a cut cannot be proved."
            )
        by_argument: dict[str, tuple[Masks, float]] = {}
        for site in sites:
            mask = mask_under(site.dim, self.masks)
            if not bool(mask.all()):
                masks, _ = by_argument.setdefault(site.argument, ({}, site.fill))
                masks[site.position] = mask
        if not by_argument:
            return func(*args, **kwargs)
        bound = bind(func, args, kwargs)
        if name in _REFERENCES:
            ((masks, _),) = by_argument.values()
            return _with_layout(func(*args, **kwargs), _REFERENCES[name](bound, masks))
        for argument, (masks, fill) in by_argument.items():
            bound[argument] = _filled(bound[argument], masks, fill)
        written = args[0] if name == "add" and func._schema.is_mutable else None
        args, kwargs = rebind(func, bound)
        result = func(*args, **kwargs)
        return result if written is None else written.copy_(result)  # an addition in place, of a copy


def _with_layout(like: Any, values: Any) -> Any:
    """Return the values in tensors laid out like the real operation's, so that later code takes the same path."""
    if isinstance(like, tuple | list):
        return type(like)(_with_layout(a, b) for a, b in zip(like, values, strict=True))
    return like.copy_(values)


def _along(mask: Tensor, position: int, x: Tensor) -> Tensor:
    """Return a mask shaped so that it broadcasts along one dim of x."""
    return mask.to(x.device).view([-1 if i == position else 1 for i in range(x.dim())])


def _filled(x: Tensor, masks: Masks, fill: float) -> Tensor:
    x = x.detach().clone()  # keeps the memory layout, on which PyTorch's choice of operations depends
    for position, mask in masks.items():
        kept = _along(mask, position, x)
        if fill == 0 and x.dtype in _BITS:  # several times as fast, and zero whatever was there
            x.view(_BITS[x.dtype]).bitwise_and_(-kept.to(_BITS[x.dtype]))
        else:
            x.masked_fill_(~kept, fill)
    return x


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers of the same size: -1 has all bits set, 0 none, and no bits are the number 0.0."""


def _weights(x: Tensor, masks: Masks) -> Tensor:
    """Return 1 for kept and 0 for removed entries, broadcastable to x."""
    weight = torch.ones([1] * x.dim(), dtype=x.dtype, device=x.device)
    for position, mask in masks.items():
        weight = weight * _along(mask, position, x).to(x.dtype)
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


_REFERENCES: dict[str, Reference] = {
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
