"""Example inputs in the forms that people pass, and running a model without leaving a trace on it."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import InvalidInputs, StructureError


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def tensors(self) -> list[Tensor]:
        """Return every tensor in the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return the same arguments with floating-point tensors in `dtype`."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Inputs(tree_map(cast, self.args), tree_map(cast, dict(self.kwargs)))


def as_inputs(example_inputs: Any, example_kwargs: Mapping[str, Any] | None = None) -> Inputs:
    """Return arguments from a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Raises:
        InvalidInputs: Neither of these, or no tensor inside.
    """
    if isinstance(example_inputs, Inputs):
        return example_inputs
    if isinstance(example_inputs, Mapping):
        inputs = Inputs((), {**example_inputs, **(example_kwargs or {})})
    elif isinstance(example_inputs, tuple | list):
        inputs = Inputs(tuple(example_inputs), dict(example_kwargs or {}))
    else:
        inputs = Inputs((example_inputs,), dict(example_kwargs or {}))
    if not inputs.tensors():
        raise InvalidInputs(
            f"The example inputs hold no tensor (got {type(example_inputs).__name__}). "
            "Pass a tensor, a tuple of positional arguments, or a dict of keyword arguments."
        )
    return inputs


def redrawn(inputs: Inputs, seed: int) -> Inputs:
    """Return other inputs of the same shapes: real numbers drawn anew, integers and truth values in another order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return shuffled(value, seed) if isinstance(value, Tensor) else value
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        drawn = scale * (torch.randn(value.shape, generator=generator) + seed % 3 - 1)
        return drawn.to(value.device, value.dtype)

    return Inputs(tree_map(draw, inputs.args), tree_map(draw, dict(inputs.kwargs)))


def with_batch(inputs: Inputs, batch: int | None) -> Inputs:
    """Return inputs with `batch` samples, repeating those there are; the same if it is None."""
    if batch is None:
        return inputs
    present = inputs.tensors()[0].shape[0]
    index = torch.arange(batch) % present

    def resize(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() and value.shape[0] == present else value

    return Inputs(tree_map(resize, inputs.args), tree_map(resize, dict(inputs.kwargs)))


def shuffled(tensor: Tensor, seed: int) -> Tensor:
    """Return the entries of a tensor in a random order that depends on the seed."""
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed))
    return tensor.flatten()[order.to(tensor.device)].view(tensor.shape)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; modes, attributes of modules and random states are restored.

    Attributes include hooks, lists and dicts: some libraries install hooks at the first call and note that they did.
    PyTorch's fused attention layers are off meanwhile: they are one opaque operation, and only eval mode takes them.
    """
    attributes = [(vars(module), _snapshot(vars(module))) for _, module in modules_of(model)]
    fused = torch.backends.mha.get_fastpath_enabled()
    numpy = sys.modules.get("numpy")  # some models draw masks from it
    drawn = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=_cuda_devices(model)), torch.no_grad():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for own, _ in attributes:
                own["training"] = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            random.setstate(drawn[0])
            if numpy:
                numpy.random.set_state(drawn[1])
            for own, before in attributes:
                own.clear()
                for name, (value, content) in before.items():
                    own[name] = value
                    if content is not None and (value or content):
                        value.clear()
                        (value.extend if isinstance(value, list) else value.update)(content)


def _snapshot(attributes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return each value by name, with a copy of its content if it is a plain container."""
    return {name: (value, _content(value)) for name, value in attributes.items()}


def _content(value: Any) -> Any:
    if type(value) not in _CONTAINERS:
        return None
    return value.copy() if value else ()  # most are empty: the hooks of a module without any


_CONTAINERS = frozenset({dict, OrderedDict, list, set})


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return every module by its first name, in the order of ``named_modules``, which takes ten times as long."""
    found, seen = [], set[nn.Module]()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((name, module))
        prefix = f"{name}." if name else ""
        children = [(prefix + key, child) for key, child in module._modules.items() if child is not None]
        waiting.extend(reversed(children))
    return found


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer (persistent or not) by its first name, shared tensors once."""
    state: dict[str, Tensor] = {}
    seen = set[int]()
    modules = modules_of(model)
    places: list[list[tuple[str, Mapping[str, Tensor | None]]]] = [
        [(name, module._parameters) for name, module in modules],
        [(name, module._buffers) for name, module in modules],
    ]
    for name, own in (place for kind in places for place in kind):
        for key, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                state[f"{name}.{key}" if name else key] = tensor
    return state


def memory_of(tensor: Tensor) -> int:
    """Return a number of the memory in which a tensor lies; another tensor may have it later."""
    return int(tensor.untyped_storage()._cdata)


def aliases_of(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Return which tensors share the memory of an earlier one, by name -> its name.

    Returns:
        Those that are the whole of it, entry by entry (a buffer made from ``weight.data``), and those that overlap it
        in another way (a part, a transposed view).
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    whole, partly = {}, {}
    for name, tensor in state_of(model).items():
        others = by_storage.setdefault(memory_of(tensor), [])
        for other_name, other in others:
            same = tensor.shape == other.shape and tensor.stride() == other.stride() and tensor.dtype == other.dtype
            if same and tensor.storage_offset() == other.storage_offset():
                whole[name] = other_name
                break
            if _extent(tensor).start < _extent(other).stop and _extent(other).start < _extent(tensor).stop:
                partly[name] = other_name
                break
        else:
            others.append((name, tensor))
    return whole, partly


def _extent(tensor: Tensor) -> range:
    """Return the bytes of its storage between which a tensor lies."""
    if tensor.numel() == 0:
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    width = tensor.element_size()
    return range(width * tensor.storage_offset(), width * (tensor.storage_offset() + last + 1))


@contextmanager
def holding(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other tensors into every place that holds a parameter or buffer; the originals come back at the end.

    ``torch.func.functional_call`` does not restore a module that is registered under two names.
    """
    names = {id(tensor): name for name, tensor in state_of(model).items()}
    originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for _, module in modules_of(model):
            places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for own in places:
                originals.append((own, dict(own)))
                for key, tensor in own.items():
                    if tensor is not None and names[id(tensor)] in state:
                        own[key] = state[names[id(tensor)]]
        yield
    finally:
        for own, before in originals:
            own.clear()
            own.update(before)


def call_with_state(model: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Return the model's output with other parameters and buffers, which the model may write to.

    Raises:
        InvalidInputs: The model does not run on these inputs.
        StructureError: Code that listens to the run has refused it.
    """
    try:
        with holding(model, state):
            return model(*inputs.args, **inputs.kwargs)
    except StructureError:
        raise
    except Exception as error:
        advice = "Pass inputs for which model(*inputs) works."
        if any(tensor.is_meta for tensor in state.values()):
            advice = (
                "Tensors on the meta device have no values. If the model's code needs one of an input, pass inputs "
                "with values; if it needs one that depends on a weight, take a small network of the same kind."
            )
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in inputs.tensors())
        raise InvalidInputs(
            f"The model does not run on the example inputs ({shapes}): {type(error).__name__}: {error}. {advice}"
        ) from error


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output: any nesting of tuples, lists, dicts, dataclasses and registered containers.

    Objects of other classes are opened only if nothing else holds a tensor (caches travel beside the real outputs).
    """
    return _tensors_in(output, any_class=False) or _tensors_in(output, any_class=True)


def _tensors_in(output: Any, any_class: bool) -> list[Tensor]:
    found = []
    for item in tree_leaves(output):
        if isinstance(item, Tensor):
            found.append(item)
        elif is_dataclass(item) and not isinstance(item, type):
            found += _tensors_in([getattr(item, f.name) for f in fields(item)], any_class)
        elif any_class and hasattr(item, "__dict__") and not isinstance(item, type | nn.Module):
            found += _tensors_in(list(vars(item).values()), any_class=False)
    return found


def held_tensors(value: Any) -> list[Tensor]:
    """Return every tensor in a container, or in the attributes of an object, at any depth; modules are not opened."""
    found, waiting, seen = [], [value], set[int]()
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type | nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        else:
            waiting.extend(getattr(item, "__dict__", {}).values())
    return found


OUTLIER = 1e4
"""Entries so many times larger than the typical one (masked logits) are compared with themselves."""


def has_entries(output: Any) -> bool:
    """Return whether there is any number in an output."""
    return any(tensor.numel() for tensor in output_tensors(output))


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference over all output tensors, relative to the largest ordinary entry of each.

    Integers must be equal. Infinite if shapes differ, if a difference is not finite, or if there is nothing to compare.
    """
    ours, theirs = output_tensors(found), output_tensors(expected)
    if not theirs or [a.shape for a in ours] != [b.shape for b in theirs]:
        return float("inf")
    return max(map(_difference, ours, theirs))


def _difference(a: Tensor, b: Tensor) -> float:
    if b.numel() == 0 or torch.equal(a, b):
        return 0.0
    if not (b.is_floating_point() or b.is_complex()):
        return float("inf")
    size = b.abs().double()
    ordinary = size[(size > 0) & size.isfinite()]
    if ordinary.numel() == 0:
        return float("inf")
    scale = ordinary[ordinary <= OUTLIER * ordinary.median()].max()
    wide = torch.complex128 if b.is_complex() else torch.float64
    error = (a.to(wide) - b.to(wide)).abs() / torch.maximum(size, scale)
    worst = error[a != b].max().item()
    return worst if worst == worst else float("inf")
