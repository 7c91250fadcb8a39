"""The reference that a cut network is compared with: the dense network with units absent where they are consumed.

The dense model runs unchanged; wherever an operation combines all indices of a cut dim, the entries of removed
units are replaced by the value that does not count (0 for sums, -inf for maxima and softmax), and where a statistic
is taken over the dim (LayerNorm, a mean), it is restricted to the kept units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import StructureError
from secateur.structure.attention import opened_attention
from secateur.structure.dims import Dim, mask_under
from secateur.structure.inputs import Inputs, call_with_state, undisturbed
from secateur.structure.operations import bind, operation_name, rebind, written_arguments
from secateur.structure.references import REFERENCES, Masks, along
from secateur.structure.rules import apply_rule
from secateur.structure.structure import Kept, Structure
from secateur.structure.trace import FunctionMode, followed
from secateur.structure.tracer import OpCall, Site, Tracer

Absent = Mapping[str, tuple[Masks, float]]
"""Name of an argument -> which of its indices are kept, and the value that the others get."""


def run_masked(model: nn.Module, structure: Structure, kept: Kept, state: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Return the output of the dense model with the given state when only the `kept` units take part.

    Where units are consumed is known from the traced run. If the model's path depends on its parameters, it may be
    another one now, and the rules are asked again while it runs. They do not know where branches end, so where one is
    dropped the path must be the same; nor what later operations say of a tensor: one that the code makes and sums up
    before it meets a layer's units is not masked, and a right cut is refused.

    Raises:
        StructureError: The rules say more of this path than the structure holds, or it is not the traced one.
        InvalidInputs: The model does not run.
    """
    cut = {name: mask for name, mask in kept.items() if not bool(mask.all())}
    if structure.reads_values and not drops_branches(structure, cut):
        return _run_anew(model, structure.cut({}), cut, state, inputs)
    with undisturbed(model), opened_attention(model), _AsTraced(structure, cut):
        return call_with_state(model, state, inputs)


def drops_branches(structure: Structure, kept: Kept) -> bool:
    """Return whether a cut drops residual branches."""
    return any(not bool(kept[branch.name].all()) for branch in structure.branches if branch.name in kept)


def _run_anew(model: nn.Module, structure: Structure, kept: Kept, state: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Do the same on a path that was not traced; what the rules say binds the dims of `structure`."""
    tracer = Tracer()
    for name, tensor in state.items():
        tracer.set(tensor, structure.tensors[name])
        tracer.parameter_of[tensor] = name
    for tensor in inputs.tensors():
        tracer.fresh(tensor, "input")
    as_it_runs = _AsItRuns(tracer, structure.masks(kept))
    with undisturbed(model), opened_attention(model), followed(model, tracer), FunctionMode(tracer), as_it_runs:
        output = call_with_state(model, state, inputs)
    as_it_runs.masks()
    return output


class _AsTraced(TorchDispatchMode):
    """Masks what the operations of the traced run consume."""

    def __init__(self, structure: Structure, kept: Kept) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
            raise StructureError(f"The model took another path than when it was traced ({name} instead of {expected}).")
        absent = _absent(sites, self.masks)
        return _without(absent, func, args, kwargs) if absent else func(*args, **kwargs)


class _AsItRuns(TorchDispatchMode):
    """Asks the rule of each operation what it consumes, once it has run, and then runs it without that."""

    def __init__(self, tracer: Tracer, masks: Mapping[Dim, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.given = masks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        before = [(tensor, tensor.clone()) for tensor in written_arguments(func, args, kwargs)]
        result = func(*args, **kwargs)
        self.tracer.operations.append(name)
        apply_rule(OpCall(self.tracer, name, bind(func, args, kwargs), result))
        sites = self.tracer.sites.pop(len(self.tracer.operations) - 1, ())
        absent = _absent(sites, self.masks()) if sites else {}
        if not absent:
            return result
        for tensor, value in before:
            tensor.copy_(value)
        return _with_layout(result, _without(absent, func, args, kwargs))

    def masks(self) -> dict[Dim, Tensor]:
        """Return the mask of each axis by its present representative.

        Raises:
            StructureError: The rules have split an axis, or found that two are the same.
        """
        masks = {dim.find(): mask for dim, mask in self.given.items()}
        if len(masks) < len(self.given) or any(dim.op for dim in masks):
            raise StructureError("The path depends on values, and on this one other axes were found than in the trace.")
        return masks


def _absent(sites: Iterable[Site], masks: Mapping[Dim, Tensor]) -> Absent:
    """Return which entries of which arguments belong to removed units."""
    absent: dict[str, tuple[dict[int, Tensor], float]] = {}
    for site in sites:
        mask = mask_under(site.dim, masks)
        if not bool(mask.all()):
            absent.setdefault(site.argument, ({}, site.fill))[0][site.position] = mask
    return absent


def _without(absent: Absent, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what an operation computes when the removed units are absent."""
    name, bound = operation_name(func), bind(func, args, kwargs)
    if name in REFERENCES:
        ((masks, _),) = absent.values()
        return _with_layout(func(*args, **kwargs), REFERENCES[name](bound, masks))
    for argument, (masks, fill) in absent.items():
        bound[argument] = _filled(bound[argument], masks, fill)
    new_args, new_kwargs = rebind(func, bound)
    result = func(*new_args, **new_kwargs)
    written = args[0] if name == "add" and func._schema.is_mutable else None
    return result if written is None else written.copy_(result)  # an addition in place, of a copy


def _with_layout(like: Any, values: Any) -> Any:
    """Return the values in tensors laid out like the real operation's, so that later code takes the same path."""
    if isinstance(like, tuple | list):
        return type(like)(_with_layout(a, b) for a, b in zip(like, values, strict=True))
    return like.copy_(values)


def _filled(x: Tensor, masks: Masks, fill: float) -> Tensor:
    x = x.detach().clone()  # keeps the memory layout, on which PyTorch's choice of operations depends
    for position, mask in masks.items():
        kept = along(mask, position, x)
        if fill == 0 and x.dtype in _BITS:  # several times as fast, and zero whatever was there
            x.view(_BITS[x.dtype]).bitwise_and_(-kept.to(_BITS[x.dtype]))
        else:
            x.masked_fill_(~kept, fill)
    return x


_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers of the same size: -1 has all bits set, 0 none, and no bits are the number 0.0."""
