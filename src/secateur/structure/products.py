"""Products that a trace leaves out: it asks for shapes, and numbers matter only where the code looks at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._pytree import tree_map

from secateur.structure.inputs import memory_of
from secateur.structure.operations import operation_name
from secateur.structure.weightless import shaped, tensors_in, weightless

PRODUCTS = frozenset({"mm", "addmm", "convolution"})
"""What takes most of a run's time. Their results are contiguous; those of convolutions, if all that they take is."""

READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
"""Marks of operations by which values of tensors decide about numbers in Python code, or about shapes."""


class Products:
    """Runs operations, and returns zeros in the place of products with a parameter.

    Attributes:
        missed: Whether something has looked at values that follow from such zeros, so that the run says nothing.
    """

    def __init__(self, is_parameter: Callable[[Tensor], bool]) -> None:
        self.missed = False
        self._is_parameter = is_parameter
        self._unknown = set[int]()  # by memory, because values are written into views, too

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation, or zeros of its shape."""
        tensors = list(tensors_in((args, kwargs)))
        if self._left_out(operation_name(func), tensors):
            empty = shaped(func, *tree_map(_without_memory, (args, kwargs)))
            result = torch.zeros(empty.shape, dtype=empty.dtype, device=tensors[0].device)
        else:
            unknown = any(map(self.follows, tensors))
            result = func(*args, **kwargs)
            if not unknown:  # its memory may have been that of another tensor, which is gone
                self._unknown.difference_update(map(memory_of, tensors_in(result)))
                return result
            self.missed = self.missed or not READS.isdisjoint(func.tags)
            if func._schema.is_mutable:
                self._unknown.update(map(memory_of, tensors))
        self._unknown.update(map(memory_of, tensors_in(result)))
        return result

    def _left_out(self, name: str, tensors: list[Tensor]) -> bool:
        """PyTorch picks operations by layouts, so where one is not certain, the operation runs."""
        if name not in PRODUCTS or not any(map(self._is_parameter, tensors)) or any(t.is_meta for t in tensors):
            return False
        if len({tensor.dtype for tensor in tensors}) > 1:  # an error, which tensors without memory do not raise
            return False
        return name != "convolution" or all(
            tensor.is_contiguous() and suggest_memory_format(tensor) is torch.contiguous_format for tensor in tensors
        )

    def follows(self, tensor: Tensor) -> bool:
        """Return whether the values of a tensor may follow from a product that was left out."""
        return memory_of(tensor) in self._unknown


def _without_memory(leaf: Any) -> Any:
    return weightless(leaf.detach()) if isinstance(leaf, Tensor) else leaf
