"""Example inputs in the forms that people pass, and running a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from secateur.errors import InvalidInputs


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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; modes and random states are restored."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=_cuda_devices(model)), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer (persistent or not) by its first name, shared tensors once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def call_with_state(model: nn.Module, state: Mapping[str, Tensor], inputs: Inputs) -> Any:
    """Return the model's output with other parameters and buffers, which the model may write to.

    Raises:
        InvalidInputs: The model does not run on these inputs.
    """
    try:
        return functional_call(model, dict(state), inputs.args, dict(inputs.kwargs))
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in inputs.tensors())
        raise InvalidInputs(
            f"The model does not run on the example inputs ({shapes}): {type(error).__name__}: {error}. "
            "Pass inputs for which model(*inputs) works."
        ) from error


def output_tensors(output: Any) -> list[Tensor]:
    """Return the tensors of an output: a tensor, or any nesting of tuples, lists, dicts and registered containers."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def relative_error(found: Any, expected: Any) -> float:
    """Return max |found - expected| / max |expected| over all floating-point output tensors; inf if shapes differ."""
    worst = 0.0
    pairs = list(zip(output_tensors(found), output_tensors(expected), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        if not b.is_floating_point() or b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        scale = b.abs().max().clamp_min(1e-30)
        error = ((a - b).abs().max() / scale).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst
