"""Running a model on tensors without memory (PyTorch's meta device): an analysis needs shapes, not numbers.

Code that looks at numbers still works where no weight has a part in them (positions, masks, integer inputs):
`KnownValues` computes those beside the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from secateur.structure.inputs import Inputs, call_with_state, memory_of, output_tensors, state_of, undisturbed
from secateur.structure.operations import written_arguments


def weightless(tensor: Tensor) -> Tensor:
    """Return a parameter or buffer of the same shape, dtype and layout that has no memory."""
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


class KnownValues(TorchDispatchMode):
    """While it is active, code may look at values that were given to `hide`, and at those that follow from them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = WeakIdKeyDictionary()

    def hide(self, value: Tensor) -> Tensor:
        """Return a tensor without memory in the place of `value`, which is remembered (if it has one)."""
        empty = torch.empty_like(value, device="meta")
        if not value.is_meta:
            self._values[empty] = value
        return empty

    def hide_all(self, inputs: Inputs) -> Inputs:
        """Return arguments with every tensor hidden."""

        def hidden(value: Any) -> Any:
            return self.hide(value) if isinstance(value, Tensor) else value

        return Inputs(tree_map(hidden, inputs.args), tree_map(hidden, dict(inputs.kwargs)))

    def hide_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state of a model without memory; what parameters hold counts as unknown."""
        state = state_of(model).items()
        return {name: weightless(t) if isinstance(t, nn.Parameter) else self.hide(t) for name, t in state}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        if not all(t in self._values or not t.is_meta for t in tensors):
            self._forget_written(func, args)
            return shaped(func, args, kwargs)
        value = func(*tree_map(self._reveal, args), **tree_map(self._reveal, kwargs))
        device = kwargs.get("device")
        stays = any(t.is_meta for t in tensors) if device is None else torch.device(device).type == "meta"
        if not stays:
            return value
        try:
            result = func(*args, **kwargs)
        except (NotImplementedError, RuntimeError):  # a number, or a shape that depends on values
            return tree_map(lambda leaf: self.hide(leaf) if isinstance(leaf, Tensor) else leaf, value)
        for empty, own in zip(tree_leaves(result), tree_leaves(value), strict=True):
            if isinstance(empty, Tensor):
                self._values[empty] = own
        return result

    def _reveal(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._values.get(leaf, leaf)
        return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf

    def _forget_written(self, func: Any, args: tuple[Any, ...]) -> None:
        """What an unknown value is written into is unknown from now on, and so is everything in the same memory."""
        for tensor in written_arguments(func, args, {}):
            if tensor in self._values:
                for other in [t for t in self._values if memory_of(t) == memory_of(tensor)]:
                    del self._values[other]


# ------------------------------------------------------------------------------------------- shapes, remembered


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in the arguments of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))


def shaped(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what an operation returns on tensors without memory.

    It follows from the shapes, so an operation that was asked before is not asked again: the layers of a network are
    alike, and PyTorch works out some shapes in Python.
    """
    if _returns_new_tensors(func):
        try:
            asked = _description(args), _description(tuple(kwargs.items()))
        except _NotDescribed:
            pass
        else:
            return _made(_described_results(func, *asked))
    return func(*args, **kwargs)


@cache
def _returns_new_tensors(func: Any) -> bool:
    return not any(value.alias_info for value in (*func._schema.arguments, *func._schema.returns))


class _NotDescribed(Exception):
    """More than shapes and numbers matters."""


_PLAIN = (int, float, bool, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _description(value: Any) -> tuple[Any, ...]:
    """Return what the shapes of results depend on, in a form that can be compared."""
    if type(value) in (Tensor, nn.Parameter) and value.is_meta and value.layout is torch.strided:
        return Tensor, tuple(value.shape), value.stride(), value.dtype
    if type(value) in (tuple, list):
        return type(value), tuple(map(_description, value))
    if type(value) not in _PLAIN:
        raise _NotDescribed
    return type(value), value  # the type, because 1 is equal to 1.0 and to True


def _made(description: tuple[Any, ...]) -> Any:
    """Return new values that fit a description."""
    kind, *content = description
    if kind is Tensor:
        shape, stride, dtype = content
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return kind(map(_made, content[0])) if kind in (tuple, list) else content[0]


@lru_cache(maxsize=2**14)
def _described_results(func: Any, args: tuple[Any, ...], kwargs: tuple[Any, ...]) -> tuple[Any, ...]:
    return _description(func(*_made(args), **dict(_made(kwargs))))


# ------------------------------------------------------------------------------------- what a model computes


class Computation(TorchDispatchMode):
    """While it is active: the operations that run, with their arguments; what any of them returns is a number.

    Args:
        given: The tensors that the run begins with.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Any] = []
        self._count = 0
        self._numbers = WeakIdKeyDictionary()
        self.number(given)

    def number(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor the next number."""
        for tensor in tensors:
            self._numbers[tensor] = self._count
            self._count += 1

    def note(self, step: Any) -> None:
        """Add something that was computed, or that was done with it."""
        self.steps.append(tree_map(self._known, step))

    def _known(self, leaf: Any) -> Any:
        """Return the number of a tensor; a constant that the code has made stays itself."""
        number = self._numbers.get(leaf) if isinstance(leaf, Tensor) else None
        return leaf if number is None else ("number", number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note((func, args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        self.number(tensors_in(result))
        return result

    def same(self, other: Computation) -> bool:
        """Return whether both do the same, whatever the values of the tensors that they begin with."""
        (ours, own_form), (theirs, other_form) = tree_flatten(self.steps), tree_flatten(other.steps)
        return own_form == other_form and all(map(_same, ours, theirs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not (a.is_meta or b.is_meta) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def computation(model: nn.Module, inputs: Inputs) -> Computation:
    """Return what a model does with its state and the inputs, worked out without memory.

    Raises:
        InvalidInputs: The model's code needs the values of its parameters.
    """
    known = KnownValues()
    state, given = known.hide_state(model), known.hide_all(inputs)
    computed = Computation([*state.values(), *given.tensors()])
    with undisturbed(model), known, computed:
        output = call_with_state(model, state, given)
    computed.note(output_tensors(output))
    return computed
