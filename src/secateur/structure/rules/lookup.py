"""Lookup: a dim that is indexed by the values of another tensor cannot be cut; the other dims pass.

Unless those values are known to name units: then the dim is theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.structure.dims import Dim, leaf
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import broadcast
from secateur.structure.tracer import OpCall, Tracer


def _look_up(tracer: Tracer, index: Tensor | None, dim: Dim) -> None:
    """Say that the entries of `index` name units of a dim."""
    if not tracer.names(index, "index", dim):
        tracer.freeze([dim], "looked up by index")


@rule("embedding")
def embedding(call: OpCall) -> None:
    """(vocabulary, width) looked up by an index of any shape."""
    tracer = call.tracer
    rows, width = tracer.dims(call["weight"])
    _look_up(tracer, call["indices"], rows)
    tracer.set(call.out, [*tracer.dims(call["indices"]), width])


@rule("index_select")
def index_select(call: OpCall) -> None:
    """One dim is replaced by the dim of the index."""
    tracer, position = call.tracer, call["dim"] % call["self"].dim()
    dims = list(tracer.dims(call["self"]))
    _look_up(tracer, call["index"], dims[position])
    dims[position] = tracer.dims(call["index"])[0]
    tracer.set(call.out, dims)


@rule("index")
def index(call: OpCall) -> None:
    """Advanced indexing."""
    call.tracer.set(call.out, _selection(call.tracer, call["self"], call["indices"]))


@rule("index_put")
def index_put(call: OpCall) -> None:
    """Values are written where advanced indexing would read them."""
    tracer, x, values = call.tracer, call["self"], call["values"]
    selection = _selection(tracer, x, call["indices"])
    for dim, own in zip(reversed(selection), reversed(tracer.dims(values)), strict=False):
        if own.size > 1:
            tracer.unify(dim, own)
    tracer.set(call.out, tracer.dims(x))


def _selection(tracer: Tracer, x: Tensor, indices: list[Tensor | None]) -> list[Dim]:
    """Return the dims of ``x[indices]``: indexed dims give way to those of the indices; a mask covers several dims."""
    dims = tracer.dims(x)
    used: list[int] = []
    position = 0
    for item in indices:
        covered = item.dim() if item is not None and item.dtype == torch.bool else 1
        if item is not None:
            used += range(position, position + covered)
        position += covered
    tensors = [item for item in indices if item is not None]
    for i in used:
        _look_up(tracer, tensors[0] if len(used) == len(tensors) == 1 else None, dims[i])
    masks = [t for t in tensors if t.dtype == torch.bool]
    if masks:
        for mask in masks:
            tracer.freeze(tracer.dims(mask), "selects by its values")
        looked_up = [leaf(int(masks[0].sum()), "selected by a mask")]
    else:
        looked_up = broadcast(tracer, tensors, max(t.dim() for t in tensors))
    rest = [d for i, d in enumerate(dims) if i not in used]
    at = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    return [*rest[:at], *looked_up, *rest[at:]]


@rule("index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce")
def scatter(call: OpCall) -> None:
    """Slices are written at places that an index names; the other dims are equal."""
    tracer, x, position = call.tracer, call["self"], call["dim"] % max(call["self"].dim(), 1)
    dims = tracer.dims(x)
    source = next((call.arguments[n] for n in ("src", "source") if isinstance(call.arguments.get(n), Tensor)), None)
    for tensor in (source, call["index"]):
        if tensor is None or tensor.dim() != x.dim():
            continue
        for i, (a, b) in enumerate(zip(dims, tracer.dims(tensor), strict=True)):
            if i == position or a.size != b.size:
                tracer.freeze([b] if i == position else [a, b], "looked up by index")
            else:
                tracer.unify(a, b)
    _look_up(tracer, call["index"], dims[position])
    tracer.set(call.out, dims)


@rule("gather")
def gather(call: OpCall) -> None:
    """The gathered dim is looked up; the others are those of the index."""
    tracer, position = call.tracer, call["dim"] % call["self"].dim()
    dims, chosen = tracer.dims(call["self"]), tracer.dims(call["index"])
    tracer.freeze([chosen[position]], "looked up by index")
    _look_up(tracer, call["index"], dims[position])
    for i, (a, b) in enumerate(zip(dims, chosen, strict=True)):
        if i != position and a.size == b.size:
            tracer.unify(a, b)
        elif i != position:
            tracer.freeze([a, b], "gathered in part")
    tracer.set(call.out, chosen)
