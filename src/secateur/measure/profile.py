"""Counting parameters, bytes and multiply-adds.

One MAC is one multiply-add (2 FLOPs). Counted are matrix products, convolutions and attention, as PyTorch's own
FLOP counter does; biases, normalization, activations and pooling are not. Dense MACs are what a dense engine
executes, effective MACs leave out the products with weights that are zero, and those with channels that a network
with gates does not compute for an input (at least so many).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import InvalidInputs
from secateur.measure.conditional import shares_taken
from secateur.structure.gated import gates_of
from secateur.structure.inputs import Inputs, as_inputs, call_with_state, state_of, undisturbed
from secateur.structure.operations import bind, operation_name
from secateur.structure.weightless import KnownValues


@dataclass(frozen=True)
class Profile:
    """What a model costs.

    Attributes:
        params: Number of parameters.
        nonzero_params: Number of those that are not zero.
        macs: Multiply-adds of one call with the example inputs (all samples of the batch together).
        effective_macs: The same without products with zero weights; where channels are chosen for each input, the most
            that any input takes.
        bytes: Size of parameters and buffers.
    """

    params: int
    nonzero_params: int
    macs: int
    effective_macs: int
    bytes: int

    def as_dict(self) -> dict[str, int]:
        """Return the numbers by name."""
        return asdict(self)


@dataclass
class MacCount:
    """Multiply-adds of one call, in total and by the parameter that was multiplied with."""

    total: int = 0
    by_parameter: dict[str, int] = field(default_factory=dict)


def profile(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Profile:
    """Return what `model` costs; it runs once, in eval mode, and is left as it was.

    Parameters on the meta device have no values; they count as not zero.

    Example:
        >>> profile(nn.Linear(10, 20), torch.zeros(1, 10)).macs
        200
    """
    counted = count_macs(model, example_inputs, example_kwargs)
    parameters = dict(model.named_parameters())
    nonzero = {name: p.numel() if p.is_meta else int(p.count_nonzero()) for name, p in parameters.items()}
    taken = {name: nonzero[name] / parameters[name].numel() for name in counted.by_parameter}
    for name, share in shares_taken(model, as_inputs(example_inputs, example_kwargs)).items():
        taken[name] *= share
    saved = sum(macs * (1 - taken[name]) for name, macs in counted.by_parameter.items())
    return Profile(
        params=sum(p.numel() for p in parameters.values()),
        nonzero_params=sum(nonzero.values()),
        macs=counted.total,
        effective_macs=round(counted.total - saved),
        bytes=sum(t.numel() * t.element_size() for t in state_of(model).values()),
    )


def count_macs(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> MacCount:
    """Return the multiply-adds of one call of `model` with the example inputs.

    Shapes are enough to count, so the call runs on tensors without memory, unless the model's code asks for values.
    """
    inputs = as_inputs(example_inputs, example_kwargs)
    try:
        known = KnownValues()
        state, given = known.hide_state(model), known.hide_all(inputs)
        with known:
            return _count(model, state, given)
    except InvalidInputs:
        state = {name: t if isinstance(t, nn.Parameter) else t.clone() for name, t in state_of(model).items()}
        return _count(model, state, inputs)


def macs_per_sample(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Tensor:
    """Return the multiply-adds that each sample of a batch takes: different ones where channels are chosen for each.

    Counted are the channels that are not zero, in eval mode, and the predictions of which those are.

    Returns:
        Of shape (samples,), float64.
    """
    inputs = as_inputs(example_inputs, example_kwargs)
    counted, samples = count_macs(model, inputs), len(inputs.tensors()[0])
    macs = torch.full((samples,), counted.total / samples, dtype=torch.float64)

    def count(path: str) -> Any:
        whole = counted.by_parameter[f"{path}.convolution.weight"] / samples

        def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            read, computed = ((x != 0).flatten(2).any(2).double().mean(1).cpu() for x in (args[0], output))
            macs.sub_(whole * (1 - read * computed))

        return after

    with undisturbed(model), ExitStack() as stack:
        for path, gate in gates_of(model).items():
            stack.callback(gate.register_forward_hook(count(path)).remove)
        model(*inputs.args, **inputs.kwargs)
    return macs


def _count(model: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> MacCount:
    names = {t.untyped_storage()._cdata: name for name, t in state.items() if isinstance(t, nn.Parameter)}
    mode = _CountingMode(names)
    with undisturbed(model), mode:
        call_with_state(model, state, inputs)
    return mode.count


class _CountingMode(TorchDispatchMode):
    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.count = MacCount()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        counter = _COUNTERS.get(operation_name(func))
        if counter is not None:
            bound = bind(func, args, kwargs or {})
            out = result[0] if isinstance(result, tuple | list) else result
            macs = counter(bound, out)
            self.count.total += macs
            operands = (value for value in bound.values() if isinstance(value, Tensor) and value.dim() > 1)
            name = next((n for v in operands if (n := self.names.get(v.untyped_storage()._cdata))), None)
            if name is not None:
                self.count.by_parameter[name] = self.count.by_parameter.get(name, 0) + macs
        return result


def _product(left: str) -> Callable[[dict[str, Any], Tensor], int]:
    """Each output entry sums over the last dim of the left operand."""
    return lambda bound, out: out.numel() * int(bound[left].shape[-1])


def _convolution(bound: dict[str, Any], out: Tensor) -> int:
    weight = bound["weight"]
    if bound["transposed"]:  # each input entry is spread over one kernel
        return int(bound["input"].numel() * weight[0].numel())
    return int(out.numel() * weight[0].numel())


def _attention(bound: dict[str, Any], out: Tensor) -> int:
    query, key, value = bound["query"], bound["key"], bound["value"]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    return int(scores * (query.shape[-1] + value.shape[-1]))


def _lstm_layer(bound: dict[str, Any], out: Tensor) -> int:
    rows = bound["input"].shape[0] * bound["input"].shape[1]
    return int(rows * (bound["weight0"].numel() + bound["weight1"].numel()))


_COUNTERS: dict[str, Callable[[dict[str, Any], Tensor], int]] = {
    "mm": _product("self"),
    "_grouped_mm": _product("self"),
    "bmm": _product("self"),
    "mv": _product("self"),
    "dot": _product("self"),
    "addmm": _product("mat1"),
    "baddbmm": _product("batch1"),
    "convolution": _convolution,
    "mkldnn_rnn_layer": _lstm_layer,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
}
