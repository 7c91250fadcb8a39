"""Running a model on tensors without memory (PyTorch's meta device): an analysis needs shapes, not numbers.

Code that looks at numbers still works where no weight has a part in them (positions, masks, integer inputs):
`KnownValues` computes those beside the run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from secateur.structure.inputs import Inputs


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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(t in self._values or not t.is_meta for t in tensors):
            self._forget_written(func, args)
            return func(*args, **kwargs)
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
        for argument, tensor in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(tensor, Tensor) and tensor in self._values:
                memory = tensor.untyped_storage()._cdata
                for other in [t for t in self._values if t.untyped_storage()._cdata == memory]:
                    del self._values[other]
