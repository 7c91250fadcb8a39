"""Lookup: a dim that is indexed by the values of another tensor cannot be cut; the other dims pass."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.structure.dims import Dim, leaf
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import broadcast
from secateur.structure.tracer import OpCall, Tracer


@rule("embedding")
def embedding(call: OpCall) -> None:
    """(vocabulary, width) looked up by an index of any shape."""
    tracer = call.tracer
    rows, width = tracer.dims(call["weight"])
    tracer.freeze([rows], "looked up by index")
    tracer.set(call.out, [*tracer.dims(call["indices"]), width])


@rule("index_select")
def index_select(call: OpCall) -> None:
    """One dim is replaced by the dim of the index."""
    tracer, position = call.tracer, call["dim"] % call["self"].dim()
    dims = list(tracer.dims(call["self"]))
    tracer.freeze([dims[position]], "looked up by index")
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
    tracer.freeze([dims[i] for i in used], "looked up by index")
    tensors = [item for item in indices if item is not None]
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
                tracer.freeze([a, b], "looked up by index")
            else:
                tracer.unify(a, b)
    tracer.freeze([dims[position]], "looked up by index")
    tracer.set(call.out, dims)


@rule("gather")
def gather(call: OpCall) -> None:
    """The gathered dim is looked up; the others are those of the index."""
    tracer, position = call.tracer, call["dim"] % call["self"].dim()
    dims, chosen = tracer.dims(call["self"]), tracer.dims(call["index"])
    tracer.freeze([dims[position], chosen[position]], "looked up by index")
    for i, (a, b) in enumerate(zip(dims, chosen, strict=True)):
        if i != position and a.size == b.size:
            tracer.unify(a, b)
        elif i != position:
            tracer.freeze([a, b], "gathered in part")
    tracer.set(call.out, chosen)
