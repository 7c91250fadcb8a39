"""What the Python side of a call says about sizes.

Below the modules there are only ATen operations, and they receive plain integers. The Python call above them
(``reshape``, ``expand``, ``split`` ...) still holds the `TracedInt` that the model's code wrote there. This module
reads those.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from secateur.structure.inputs import call_with_state
from secateur.structure.provenance import Expression, TracedInt, expression_of

Sizes = list[Expression | None]
"""One entry per dim; None where PyTorch computes the size from the shape of the input."""


@dataclass(frozen=True)
class FunctionCall:
    """A call of a public torch function or tensor method, with its arguments as the model's code wrote them."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, *names: str) -> Any:
        """Return an argument by position or by any of its names, or None."""
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[position] if len(self.args) > position else None


_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def line_of_code() -> str:
    """Return ``file:number`` of the model's innermost running line, or nothing if all of it is PyTorch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not call_with_state.__code__:
        if not frame.f_code.co_filename.startswith(_NOT_THE_MODEL):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


# Calls whose inner reshapes follow from the shapes of their inputs alone: no size is written down anywhere.
_COMPUTED = frozenset(
    "flatten ravel linear matmul __matmul__ __rmatmul__ bmm einsum tensordot bilinear scaled_dot_product_attention "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d avg_pool1d adaptive_avg_pool1d "
    "batch_norm instance_norm layer_norm group_norm normalize dropout softmax expand_as view_as broadcast_to "
    "broadcast_tensors contiguous clone to float double squeeze unsqueeze prelu outer ger reshape_as pixel_shuffle "
    "pixel_unshuffle channel_shuffle multi_head_attention_forward repeat_interleave interpolate lstm gru rnn_tanh "
    "rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell cdist cosine_similarity __setitem__".split()
)


def flat_sizes(values: Sequence[Any]) -> list[Any]:
    """Return the integers of ``view(2, 3)`` and of ``view((2, 3))`` alike."""
    if len(values) == 1 and isinstance(values[0], tuple | list | torch.Size):
        return list(values[0])
    return list(values)


def _known(values: Sequence[Any]) -> Sizes:
    return [None if int(value) == -1 else expression_of(value) for value in values]


def view_sizes(call: FunctionCall | None, out: Tensor) -> Sizes:
    """Return where the size of each dim of a reshaped tensor came from."""
    literal: Sizes = list(out.shape)
    if call is None:
        return literal
    if call.name in ("view", "reshape"):
        values = call.argument(1, "size", "shape")
        sizes = _known(flat_sizes(call.args[1:]) if len(call.args) > 1 else list(values))
        return sizes if len(sizes) == out.dim() else literal
    if call.name == "unflatten":
        dim = int(call.argument(1, "dim"))
        inner = _known(flat_sizes([call.argument(2, "sizes")]))
        before = dim if dim >= 0 else out.dim() - len(inner) + 1 + dim
        return [None] * before + inner + [None] * (out.dim() - before - len(inner))
    return [None] * out.dim() if call.name in _COMPUTED else literal


def expand_sizes(call: FunctionCall | None, source: Tensor, out: Tensor) -> Sizes:
    """Return where the size of each dim of an expanded tensor came from."""
    if call is not None and call.name in ("expand", "broadcast_to"):
        sizes = _known(flat_sizes(call.args[1:] or [call.kwargs.get("size")]))
        if len(sizes) == out.dim():
            return sizes
    if call is not None and call.name in _COMPUTED:
        return [None] * out.dim()
    before = [0] * (out.dim() - source.dim()) + list(source.shape)
    return [None if old == new else new for old, new in zip(before, out.shape, strict=True)]


def expanded_like(call: FunctionCall | None) -> Tensor | None:
    """Return the tensor whose shape an expansion takes over (``expand_as``)."""
    other = call.argument(1, "other") if call is not None and call.name in ("expand_as", "view_as") else None
    return other if isinstance(other, Tensor) else None


def factory_sizes(call: FunctionCall | None, out: Tensor) -> Sizes:
    """Return where the sizes of a newly made tensor came from."""
    if call is None:
        return list(out.shape)
    first = 1 if call.name.startswith("new_") else 0
    last = first + 1 if call.name in ("full", "new_full") else None
    values = call.kwargs.get("size", call.args[first:last])
    if isinstance(values, tuple):  # a size may be a tensor with one integer
        values = [int(v) if isinstance(v, Tensor) else v for v in values if isinstance(v, int | tuple | list | Tensor)]
    sizes = flat_sizes(values)
    if len(sizes) == out.dim() and all(int(a) == b for a, b in zip(sizes, out.shape, strict=True)):
        return _known(sizes)
    return list(out.shape)


def split_sizes(call: FunctionCall | None, lengths: Sequence[int]) -> Sizes | None:
    """Return where the lengths of the pieces came from; None if the call asked for equal pieces (``chunk``)."""
    if call is None:
        return list(lengths)
    if call.name in ("chunk", "tensor_split") and isinstance(call.argument(1, "chunks", "indices_or_sections"), int):
        return None
    if call.name in _COMPUTED:  # the gates of a recurrent layer
        return None
    if call.name in ("split", "split_with_sizes"):
        asked = call.argument(1, "split_size_or_sections", "split_size", "split_sizes")
        if isinstance(asked, int):
            return [expression_of(asked) if int(asked) == n else int(n) for n in lengths]
        return _known(list(asked))
    return list(lengths)


def slice_bounds(call: FunctionCall | None, start: int, stop: int, size: int) -> tuple[Expression, Expression | None]:
    """Return where the start and the stop of ``x[start:stop]`` came from; stop None means "to the end"."""
    if call is not None and call.name == "narrow":
        begin, length = call.argument(2, "start"), call.argument(3, "length")
        return expression_of(begin), expression_of(begin + length)
    if call is not None and call.name == "__getitem__":
        index = call.args[1]
        for item in index if isinstance(index, tuple) else (index,):
            if isinstance(item, slice) and item.indices(size) == (start, stop, 1):
                begin, end = item.start, item.stop
                known_begin = begin is None or (isinstance(begin, int) and begin >= 0)
                known_end = end is None or (isinstance(end, int) and end >= 0)
                if known_begin and known_end:
                    return (
                        0 if begin is None else expression_of(begin),
                        None
                        if end is None or int(end) > size or (stop == size and not isinstance(end, TracedInt))
                        else expression_of(end),
                    )
    return start, stop


def size_argument(call: FunctionCall | None, position: int, name: str, value: int) -> Expression:
    """Return where a single size argument (``groups``, ``num_groups``) came from."""
    found = None if call is None else call.argument(position, name)
    return expression_of(found) if isinstance(found, int) and int(found) == value else int(value)


def normalized_sizes(call: FunctionCall) -> tuple[Tensor, Sizes] | None:
    """Return the input of ``rms_norm`` and the sizes that the code wrote for its last dims."""
    if call.name != "rms_norm":
        return None
    return call.argument(0, "input"), _known(call.argument(1, "normalized_shape"))


# Functions that read integers as sizes; integers that arrive anywhere else are used for their value.
_READS_SIZES = frozenset(
    "view reshape unflatten expand broadcast_to zeros ones empty full rand randn new_zeros new_ones new_empty new_full "
    "split split_with_sizes narrow __getitem__ layer_norm rms_norm group_norm conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d histc".split()
)


def implicitly_read(call: FunctionCall) -> Tensor | None:
    """Return the tensor whose last size the function itself uses as a number: attention divides by its root."""
    if call.name == "scaled_dot_product_attention" and call.kwargs.get("scale") is None:
        query: Tensor = call.argument(0, "query")
        return query
    return None


def value_arguments(call: FunctionCall) -> list[TracedInt]:
    """Return the traced integers of a call that are used as values, not as sizes."""
    if call.name in _READS_SIZES:
        return []
    found: list[TracedInt] = []

    def visit(value: Any) -> None:
        if isinstance(value, TracedInt):
            found.append(value)
        elif isinstance(value, tuple | list):
            for item in value:
                visit(item)

    for value in (*call.args, *call.kwargs.values()):
        visit(value)
    return found
