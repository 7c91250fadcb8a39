"""Element-wise operations: dims of equal position are equal, dims of size 1 are broadcast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from secateur.structure.dims import Dim, concat, leaf
from secateur.structure.rules import rule
from secateur.structure.tracer import OpCall, Tracer

_POINTWISE = """
    _prelu_kernel abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil celu clamp clamp_max clamp_min copysign cos cosh deg2rad div elu eq erf erfc erfinv exp exp2
    expm1 fill floor floor_divide fmax fmin fmod frac ge gelu gt hardshrink hardsigmoid hardswish hardtanh heaviside
    isfinite isinf isnan le leaky_relu lerp lgamma log log10 log1p log2 log_sigmoid_forward logaddexp logical_and
    logical_not logical_or logical_xor logit lt masked_fill maximum minimum mish mul nan_to_num ne neg pow
    reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink
    sqrt square sub tan tanh threshold trunc where xlogy zero
""".split()

_SAME = """
    _to_copy alias clone contiguous detach lift lift_fresh native_dropout positive ones_like zeros_like empty_like
    full_like
""".split()


def broadcast(tracer: Tracer, tensors: list[Tensor], rank: int) -> list[Dim]:
    """Return the dims of the broadcast result, after saying that dims of equal position are equal."""
    return broadcast_dims(tracer, map(tracer.dims, tensors), rank)


def broadcast_dims(tracer: Tracer, operands: Iterable[Sequence[Dim]], rank: int) -> list[Dim]:
    """Do the same with the dims of each operand."""
    result = [leaf(1) for _ in range(rank)]
    for dims in operands:
        offset = rank - len(dims)
        for i, dim in enumerate(dims):
            if dim.size == 1:
                continue
            if result[offset + i].size == 1:
                result[offset + i] = dim
            else:
                tracer.unify(result[offset + i], dim)
    return result


@rule(*_POINTWISE)
def pointwise(call: OpCall) -> None:
    """Unify along each position."""
    tracer = call.tracer
    dims = broadcast(tracer, call.tensors, call.out.dim())
    for tensor in call.results:
        tracer.set(tensor, dims)


@rule(*_SAME)
def same_dims(call: OpCall) -> None:
    """Copy the dims of the only input."""
    source = call.tensors[0]
    for tensor in call.results:
        call.tracer.follow(tensor, source, call.tracer.dims(source))


@rule("as_strided")
def restrided(call: OpCall) -> None:
    """PyTorch's own global pooling sets strides of dims of size 1, and keeps the shape; anything else is unknown."""
    function = call.tracer.call
    if function is None or not function.name.startswith("adaptive_avg_pool"):
        raise NotImplementedError("free strides")
    call.tracer.set(call.out, call.tracer.dims(call["self"]))


@rule("copy")
def copy_into(call: OpCall) -> None:
    """Unify the source with the tensor it is written into."""
    tracer = call.tracer
    broadcast(tracer, [call["self"], call["src"]], call["self"].dim())
    tracer.set(call.out, tracer.dims(call["self"]))


@rule("glu")
def glu(call: OpCall) -> None:
    """Split a dim into two equal halves, which are multiplied: they are the same axis."""
    tracer, dim = call.tracer, call["dim"] % call["self"].dim()
    dims = list(tracer.dims(call["self"]))
    half = leaf(call.out.shape[dim])
    tracer.unify(dims[dim], concat([half, half]))
    dims[dim] = half
    tracer.set(call.out, dims)
