"""Contractions: matrix products, convolutions and attention sum over the product of two equal dims."""

from __future__ import annotations

from torch import Tensor

from secateur.structure.calls import size_argument
from secateur.structure.dims import Dim, leaf, product
from secateur.structure.rules import rule
from secateur.structure.rules.elementwise import broadcast_dims
from secateur.structure.tracer import OpCall, Tracer


def _matmul(call: OpCall, left: str, right: str, batched: bool) -> None:
    tracer, a, b = call.tracer, call[left], call[right]
    offset = 1 if batched else 0
    if batched:
        _unify_batch(tracer, a, b)
    tracer.contract((left, a, offset + 1), (right, b, offset))
    a_dims, b_dims = tracer.dims(a), tracer.dims(b)
    if a in tracer.parameter_of or b in tracer.parameter_of:
        tracer.use_as("matrix in", a_dims[offset + 1])
        tracer.use_as("matrix out", b_dims[offset + 1] if b in tracer.parameter_of else a_dims[offset])
    elif batched:  # queries with keys, or weights with values
        tracer.use_as("head", a_dims[0])
        tracer.use_as("head dim", a_dims[2], b_dims[2])
    dims = [*a_dims[: offset + 1], b_dims[offset + 1]]
    tracer.cost(*a_dims, b_dims[offset + 1])
    tracer.set(call.out, dims)


def _unify_batch(tracer: Tracer, a: Tensor, b: Tensor) -> None:
    tracer.unify(tracer.dims(a)[0], tracer.dims(b)[0])


@rule("mm")
def mm(call: OpCall) -> None:
    """(m, k) x (k, n)."""
    _matmul(call, "self", "mat2", batched=False)


@rule("bmm")
def bmm(call: OpCall) -> None:
    """(b, m, k) x (b, k, n)."""
    _matmul(call, "self", "mat2", batched=True)


@rule("addmm")
def addmm(call: OpCall) -> None:
    """A bias plus (m, k) x (k, n)."""
    bias = call.tracer.dims(call["self"])  # before it has those of the result: in place it is the result
    _matmul(call, "mat1", "mat2", batched=False)
    broadcast_dims(call.tracer, [call.tracer.dims(call.out), bias], 2)


@rule("baddbmm")
def baddbmm(call: OpCall) -> None:
    """A bias plus (b, m, k) x (b, k, n)."""
    bias = call.tracer.dims(call["self"])
    _matmul(call, "batch1", "batch2", batched=True)
    broadcast_dims(call.tracer, [call.tracer.dims(call.out), bias], 3)


_GROUPED_MULTIPLE = 8
"""The operation takes only rows of a multiple of 16 bytes, which are 8 entries of the narrowest type that it takes."""


@rule("_grouped_mm")
def grouped_mm(call: OpCall) -> None:
    """Runs of rows, each with a matrix of its own: (m, k) x (groups, k, n) -> (m, n)."""
    tracer, a, b = call.tracer, call["self"], call["mat2"]
    if a.dim() != 2 or b.dim() != 3:
        raise NotImplementedError(f"{a.dim()}-d x {b.dim()}-d")
    rows, (groups, _, n) = tracer.dims(a)[0], tracer.dims(b)
    known = tracer.names(call["offs"], "end", groups)
    tracer.freeze([rows] if known else [rows, groups], "rows are assigned to groups by value")
    for dim in (tracer.dims(a)[1], n):
        tracer.keep_multiple(dim, _GROUPED_MULTIPLE)
    tracer.use_as("experts", groups)
    tracer.use_as("matrix in", tracer.dims(a)[1])
    tracer.use_as("matrix out", n)
    tracer.contract(("self", a, 1), ("mat2", b, 1))
    tracer.cost(rows, tracer.dims(a)[1], n)
    tracer.set(call.out, [rows, n])


@rule("mv")
def mv(call: OpCall) -> None:
    """(m, k) x (k)."""
    tracer = call.tracer
    tracer.contract(("self", call["self"], 1), ("vec", call["vec"], 0))
    tracer.cost(*tracer.dims(call["self"]))
    tracer.set(call.out, tracer.dims(call["self"])[:1])


@rule("dot", "vdot")
def dot(call: OpCall) -> None:
    """(k) x (k)."""
    tracer = call.tracer
    other = "tensor" if "tensor" in call.arguments else "other"
    tracer.contract(("self", call["self"], 0), (other, call[other], 0))
    tracer.cost(*tracer.dims(call["self"]))
    tracer.set(call.out, [])


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(call: OpCall) -> None:
    """N, C_in, space with a kernel C_out, C_in / groups, space; transposed: C_in, C_out / groups, space."""
    tracer, x, weight, groups = call.tracer, call["input"], call["weight"], int(call["groups"])
    transposed = bool(call["transposed"])
    n, c_in, *space_in = tracer.dims(x)
    first, second, *kernel = tracer.dims(weight)
    tracer.freeze(kernel, "convolution kernel")
    group = leaf(groups)
    tracer.constrain(size_argument(tracer.call, 6, "groups", groups), group)
    inner = second if not transposed else leaf(x.shape[1] // groups)
    outer = leaf(weight.shape[0] // groups) if not transposed else second
    tracer.unify(c_in, product([group, inner]))
    tracer.unify(first, product([group, inner if transposed else outer]))
    c_out = product([group, outer])
    tracer.use_as("convolved", c_in, c_out)
    tracer.consume("input", x, [1])
    name = tracer.parameter_of.get(weight)
    if name is not None:
        tracer.consumers[name].append(inner)
    if call["bias"] is not None:
        tracer.unify(tracer.dims(call["bias"])[0], c_out)
    if call.out.shape[2:] == x.shape[2:] and all(d.size == 1 for d in kernel):
        space = space_in
    else:
        tracer.freeze(space_in, "spatial")
        space = [leaf(size, "spatial" if size > 1 else "") for size in call.out.shape[2:]]
    tracer.cost(n, c_out, inner, *kernel, *(space_in if transposed else space))
    tracer.set(call.out, [n, c_out, *space])


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
)
def attention(call: OpCall) -> None:
    """Query (b, h, l, e), key (b, h, s, e), value (b, h, s, v) -> (b, h, l, v)."""
    tracer, query, key, value = call.tracer, call["query"], call["key"], call["value"]
    q, k, v = tracer.dims(query), tracer.dims(key), tracer.dims(value)
    for i in range(query.dim() - 2):
        for other in (k[i], v[i]):
            if other.size == q[i].size:
                tracer.unify(q[i], other)
            else:  # grouped queries: each key and value serves a run of consecutive query heads
                tracer.unify(q[i], product([other, groups := leaf(q[i].size // other.size)]))
                tracer.freeze([groups], "query heads of one key")
                tracer.use_as("copies", groups)
    tracer.contract(("query", query, query.dim() - 1), ("key", key, key.dim() - 1))
    tracer.unify(k[-2], v[-2])
    tracer.freeze([k[-2]], "attention normalizes over keys")
    mask = call.arguments.get("attn_mask", call.arguments.get("attn_bias"))
    scores: list[Dim] = [*q[:-1], k[-2]]
    if mask is not None:
        for dim, own in zip(reversed(tracer.dims(mask)), reversed(scores), strict=False):
            if dim.size == own.size:
                tracer.unify(dim, own)
    tracer.use_as("head", *q[1:-2])
    tracer.use_as("head dim", q[-1], v[-1])
    tracer.cost(*scores, q[-1])
    tracer.cost(*scores, v[-1])
    for result in call.results:
        tracer.fresh(result)
    tracer.set(call.out, [*q[:-1], v[-1]])
