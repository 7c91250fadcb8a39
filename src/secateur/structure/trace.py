"""Runs a model once and returns its structure.

Below the modules there are only ATen operations, so every model that runs can be traced, whatever its Python looks
like. Two modes listen: one sees each ATen operation and asks its rule, the other sees the Python calls above and
follows integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import InvalidInputs
from secateur.structure.attention import opened_attention
from secateur.structure.calls import FunctionCall, implicitly_read, normalized_sizes, value_arguments
from secateur.structure.dims import Dim, freeze, product
from secateur.structure.draws import tries
from secateur.structure.inputs import (
    Inputs,
    aliases_of,
    as_inputs,
    call_with_state,
    modules_of,
    output_tensors,
    redrawn,
    shuffled,
    state_of,
    undisturbed,
)
from secateur.structure.operations import bind, operation_name
from secateur.structure.products import READS, Products
from secateur.structure.provenance import TracedInt, traced_attributes
from secateur.structure.rules import apply_rule
from secateur.structure.solve import solve
from secateur.structure.structure import Structure
from secateur.structure.tracer import OpCall, Tracer
from secateur.structure.weightless import KnownValues

# Indices of these types select as many rows as they have true entries, which the code can see.
_MASKS = {torch.bool, torch.uint8}

# Functions by which values leave PyTorch.
_TAKES_OUT = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr"}


def trace(model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Structure:
    """Return which slices of which tensors live and die together.

    The model runs once, in eval mode and without gradients; it is left as it was (parameters, buffers, modes,
    random state). Its layers are not computed, unless the model's code looks at values that follow from them.

    A model on the meta device takes no memory and no computation: its inputs may have values or not.

    Args:
        model: Any module that runs.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        example_kwargs: Further keyword arguments.

    Raises:
        InvalidInputs: The model does not run on these inputs.
    """
    inputs = as_inputs(example_inputs, example_kwargs)
    with suppress(InvalidInputs):  # with the layers' real results it may run
        structure = _traced(model, inputs, leave_out=True)
        if structure is not None:
            return structure
    structure = _traced(model, inputs, leave_out=False)
    assert structure is not None
    return structure


def _traced(model: nn.Module, inputs: Inputs, leave_out: bool) -> Structure | None:
    """Return the structure; None if layers were left out and the code has looked at what follows from them."""
    tracer = Tracer()
    products = Products(tracer.parameter_of.__contains__) if leave_out else None
    with undisturbed(model), opened_attention(model), _tensors_of(model, inputs) as (state, given):
        tensors = {name: tracer.fresh(tensor) for name, tensor in state.items()}
        for name, tensor in state.items():
            tracer.parameter_of[tensor] = name
        _follow_aliases(model, tracer, state, tensors)
        for tensor in given.tensors():
            tracer.fresh(tensor, "input")
        tracer.history.begin(given.tensors())
        with followed(model, tracer), FunctionMode(tracer, products), _OperationMode(tracer, products):
            output = call_with_state(model, state, given)
        if products is not None and products.missed:
            return None
        if not _freeze_output(tracer, output):
            raise InvalidInputs(
                f"The model's output ({type(output).__name__}) holds no tensor that secateur can find, so no cut could "
                "be checked. Return tensors, or tuples, lists, dicts or dataclasses of tensors."
            )
        _trace_other_paths(model, tracer, state, given, tensors)
        _freeze_unused(_unused(model, tracer, state), tracer, tensors)
    return solve(model, tracer, tensors, inputs)


@contextmanager
def _tensors_of(model: nn.Module, inputs: Inputs) -> Iterator[tuple[dict[str, Tensor], Inputs]]:
    """Give the tensors that a run may use up: all without memory if a parameter has none."""
    state = state_of(model)
    if not any(tensor.is_meta for tensor in state.values()):
        yield {name: t if isinstance(t, nn.Parameter) else t.clone() for name, t in state.items()}, inputs
        return
    known = KnownValues()
    hidden = known.hide_state(model), known.hide_all(inputs)
    with known:
        yield hidden


def _follow_aliases(
    model: nn.Module, tracer: Tracer, state: Mapping[str, Tensor], tensors: dict[str, list[Dim]]
) -> None:
    """Let tensors in one memory be one: they have the same dims, or none that can be cut; mutates `tensors`."""
    whole, partly = aliases_of(model)
    for name, owner in whole.items():
        tensors[name] = tensors[owner]
        tracer.set(state[name], tensors[owner])
        tracer.parameter_of[state[name]] = owner
    for name, owner in partly.items():
        for dim in (*tensors[name], *tensors[owner]):
            freeze(dim, f"{name} lies in the memory of {owner}, in another shape")


def _freeze_output(tracer: Tracer, output: Any) -> bool:
    """Freeze the dims of an output, and say whether there are any."""
    tensors = output_tensors(output)
    for tensor in tensors:
        for dim in tracer.dims(tensor):
            freeze(dim, "output")
    tracer.keep_order(tensors, "the output says which unit it is")
    return bool(tensors)


def _unused(model: nn.Module, tracer: Tracer, state: Mapping[str, Tensor]) -> list[str]:
    used = tracer.used | tracer.trained
    return [name for name, _ in model.named_parameters() if tracer.parameter_of[state[name]] not in used]


def _trace_other_paths(
    model: nn.Module,
    tracer: Tracer,
    state: Mapping[str, Tensor],
    inputs: Inputs,
    tensors: Mapping[str, list[Dim]],
) -> None:
    """Let other runs speak too while parameters are unused.

    Auxiliary heads and mask tokens work in training mode only; where the code looks at values, other inputs and other
    weights may take other branches and other experts.
    """
    if _unused(model, tracer, state):
        _trace_again(model, tracer, state, inputs, training=True)
    if any(parameter.is_meta for parameter in model.parameters()) or not tracer.reads_data:
        return
    for seed in tries(lambda: _unused(model, tracer, state)):
        other = dict(state)
        for name, parameter in model.named_parameters():
            other[name] = shuffled(parameter.detach(), seed)
            tracer.set(other[name], tensors[name])
            tracer.parameter_of[other[name]] = tracer.parameter_of[state[name]]
        _trace_again(model, tracer, other, redrawn(inputs, seed), training=False)


def _trace_again(model: nn.Module, tracer: Tracer, state: Mapping[str, Tensor], inputs: Inputs, training: bool) -> None:
    """Let one more run speak.

    What it computes is neither a cost nor a place where units are consumed; if it fails, it says nothing.
    """
    listener = tracer.listener(training)
    with undisturbed(model), suppress(InvalidInputs):
        model.train(training)
        for tensor in inputs.tensors():
            listener.fresh(tensor, "input")
        with followed(model, listener), FunctionMode(listener), _OperationMode(listener):
            output = call_with_state(model, state, inputs)
        _freeze_output(listener, output)


def _freeze_unused(unused: list[str], tracer: Tracer, tensors: Mapping[str, list[Dim]]) -> None:
    """Freeze parameters that no run has used, and, if the path depends on data, all that they could meet on another."""
    sizes: dict[int, str] = {}
    for name in unused:
        for dim in tensors[name]:
            freeze(dim, "not used in the traced call")
            sizes.setdefault(dim.size, name)
    if not tracer.reads_data:
        return
    for name in tensors.keys() - unused:
        for dim in tensors[name]:
            if dim.size > 1 and dim.size in sizes:
                freeze(dim, f"{sizes[dim.size]}, which no run has used, may meet it: the path depends on values")


class _OperationMode(TorchDispatchMode):
    """Runs each ATen operation and asks its rule."""

    def __init__(self, tracer: Tracer, products: Products | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.products = products

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs) if self.products is None else self.products.run(func, args, kwargs)
        name = operation_name(func)
        self.tracer.operations.append(name)
        call = OpCall(self.tracer, name, bind(func, args, kwargs), result)
        self.tracer.use(call.tensors)
        if not READS.isdisjoint(func.tags):
            chosen = call.tensors if name != "index" else [t for t in call.tensors if t.dtype in _MASKS]
            self.tracer.read_data(chosen)
        apply_rule(call)
        self.tracer.remember(call)
        return result


class FunctionMode(TorchFunctionMode):
    """Remembers which Python call is running, and lets sizes that the code reads remember their dim."""

    def __init__(self, tracer: Tracer, products: Products | None = None) -> None:
        super().__init__()
        self.tracer = tracer
        self.products = products

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is torch.Tensor.shape or name in ("size", "numel"):
            return self._read_size(func(*args, **kwargs), args[0], args[1:] or tuple(kwargs.values()))
        if name in ("tolist", "numpy"):
            self.tracer.read_data(args[:1])
        if name in _TAKES_OUT and self.products is not None and self.products.follows(args[0]):
            self.products.missed = True
        call = FunctionCall(name, args, kwargs)
        self.tracer.calls.append(call)
        try:
            for integer in value_arguments(call):
                self.tracer.read_value(integer.expression)
            scaled = implicitly_read(call)
            if scaled is not None:
                self.tracer.read_value(self.tracer.dims(scaled)[-1])
            normalized = normalized_sizes(call)
            if normalized is not None:
                tensor, sizes = normalized
                self.tracer.constrain_all(sizes, self.tracer.dims(tensor)[-len(sizes) :])
            return func(*args, **kwargs)
        finally:
            self.tracer.calls.pop()

    def _read_size(self, value: Any, tensor: Tensor, position: tuple[Any, ...]) -> Any:
        dims = self.tracer.dims(tensor)
        if isinstance(value, torch.Size):
            return torch.Size([TracedInt(n, dim, self.tracer) for n, dim in zip(value, dims, strict=True)])
        dim = dims[position[0]] if position else product(dims)
        return TracedInt(value, dim, self.tracer)


@contextmanager
def followed(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Know the running module, see through the Python functions of ``torch.nn.functional``, follow attributes."""
    names = {module: name for name, module in modules_of(model)}

    def enter(module: nn.Module, args: Any) -> None:
        tracer.modules.append(names.get(module, type(module).__name__))
        tracer.history.enter(tracer.modules[-1])

    def leave(module: nn.Module, args: Any, *rest: Any) -> None:
        *kwargs, output = rest  # PyTorch leaves the keyword arguments out after an exception
        tracer.modules.pop()
        tracer.history.leave((*args, *(value for given in kwargs for value in given.values())), output)
        if module in names:
            tracer.leave(names[module], output)

    with ExitStack() as stack:
        for name in ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"):
            # Otherwise a Python function such as F.multi_head_attention_forward arrives as one opaque call.
            stack.enter_context(patch.object(torch.nn.functional, name, lambda *_: False))
        stack.callback(register_module_forward_pre_hook(enter).remove)
        handle = register_module_forward_hook(leave, with_kwargs=True, always_call=True)
        stack.callback(_global_forward_hooks_with_kwargs.pop, handle.id)  # `remove` leaves it there in PyTorch 2.13
        stack.callback(handle.remove)
        stack.enter_context(traced_attributes(model, tracer))
        yield
