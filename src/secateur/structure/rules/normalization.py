"""Normalization and reduction: the affine parameters share the dim, and statistics run over some dims."""

from __future__ import annotations

from torch import Tensor

from secateur.structure.calls import size_argument
from secateur.structure.dims import leaf, product
from secateur.structure.provenance import Expression, expression_of
from secateur.structure.rules import rule
from secateur.structure.rules.movement import windowed
from secateur.structure.tracer import OpCall, Tracer

_INF = float("inf")


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
def batch_norm(call: OpCall) -> None:
    """Parameters and running statistics belong to dim 1; in training mode the batch is normalized, not the channels."""
    tracer, x = call.tracer, call["input"]
    channels = tracer.dims(x)[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.arguments.get(name) is not None:
            tracer.unify(tracer.dims(call[name])[0], channels)
    if call.arguments.get("training"):  # standardized weights are normalized by this operation, too
        tracer.consume("input", x, [i for i in range(x.dim()) if i != 1])
    _set_first(call, x)


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: OpCall) -> None:
    """Statistics run over the last dims, which are those of the parameters."""
    tracer, x = call.tracer, call["input"]
    dims = tracer.dims(x)
    shape = call["normalized_shape"]
    normalized = range(x.dim() - len(shape), x.dim())
    for i, position in enumerate(normalized):
        tracer.constrain(_written_size(call, i, shape[i]), dims[position])
        for name in ("weight", "bias"):
            if call.arguments.get(name) is not None:
                tracer.unify(tracer.dims(call[name])[i], dims[position])
    tracer.consume("input", x, normalized)
    _set_first(call, x)


def _written_size(call: OpCall, index: int, size: int) -> Expression:
    function = call.tracer.call
    written = None if function is None else function.argument(1, "normalized_shape")
    return expression_of(written[index]) if isinstance(written, tuple | list) else size


@rule("_weight_norm_interface")
def weight_norm(call: OpCall) -> None:
    """Each slice of v along `dim` is divided by its norm, which runs over the other dims, and multiplied by g."""
    tracer, v, g = call.tracer, call["v"], call["g"]
    position = call["dim"] % v.dim()
    dims = tracer.dims(v)
    for own, dim in zip(tracer.dims(g), dims, strict=True):
        if own.size > 1:
            tracer.unify(own, dim)
    tracer.consume("v", v, [i for i in range(v.dim()) if i != position])
    for tensor in call.results:
        tracer.fresh(tensor, "norms")
    tracer.set(call.out, dims)


@rule("native_group_norm")
def group_norm(call: OpCall) -> None:
    """Channels are groups x members; statistics run over the members and over space."""
    tracer, x, groups = call.tracer, call["input"], int(call["group"])
    group, member = leaf(groups), leaf(x.shape[1] // groups)
    tracer.constrain(size_argument(tracer.call, 1, "num_groups", groups), group)
    tracer.unify(tracer.dims(x)[1], product([group, member]))
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            tracer.unify(tracer.dims(call[name])[0], tracer.dims(x)[1])
    tracer.consume("input", x, range(1, x.dim()))
    _set_first(call, x)


def _set_first(call: OpCall, x: Tensor) -> None:
    """Give the first result the dims of the input; the others are statistics that only training reads."""
    for tensor in call.results:
        call.tracer.fresh(tensor, "statistics")
    call.tracer.set(call.out, call.tracer.dims(x))


_REDUCTIONS = {
    "mean": 0.0,
    "sum": 0.0,
    "nansum": 0.0,
    "prod": 1.0,
    "amax": -_INF,
    "amin": _INF,
    "logsumexp": -_INF,
    "linalg_vector_norm": 0.0,
    "norm": 0.0,
    "var": 0.0,
    "std": 0.0,
    "var_mean": 0.0,
    "std_mean": 0.0,
    "any": 0.0,
    "all": 1.0,
}


@rule(*_REDUCTIONS)
def reduction(call: OpCall) -> None:
    """Reduced dims are consumed; the others pass."""
    x = call["self"]
    asked = call.arguments.get("dim")
    positions = _positions(asked, x)
    call.tracer.consume("self", x, positions, _REDUCTIONS[call.name])
    for result in call.results:
        _drop(call.tracer, x, result, positions)


def _positions(asked: int | list[int] | None, x: Tensor) -> list[int]:
    if asked is None or asked == []:
        return list(range(x.dim()))
    return [p % max(x.dim(), 1) for p in ([asked] if isinstance(asked, int) else asked)]


def _drop(tracer: Tracer, x: Tensor, result: Tensor, positions: list[int]) -> None:
    dims = tracer.dims(x)
    if result.dim() == x.dim():
        tracer.set(result, [leaf(1) if i in positions else d for i, d in enumerate(dims)])
    else:
        tracer.set(result, [d for i, d in enumerate(dims) if i not in positions])


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(call: OpCall) -> None:
    """The normalized dim is consumed by the denominator."""
    x = call["self"]
    call.tracer.consume("self", x, [call["dim"] % max(x.dim(), 1)], -_INF)
    call.tracer.set(call.out, call.tracer.dims(x))


@rule(
    "argmax",
    "argmin",
    "max",
    "min",
    "median",
    "mode",
    "argsort",
    "cumprod",
    "logcumsumexp",
    "kthvalue",
)
def ordered(call: OpCall) -> None:
    """The result depends on which index is which: that dim is frozen."""
    tracer, x = call.tracer, call["self"]
    asked = call.arguments.get("dim")
    positions = _positions(asked, x)
    dims = tracer.dims(x)
    tracer.freeze([dims[p] for p in positions], f"{call.name} depends on the order")
    for result in call.results:
        if result.dim() == x.dim():
            tracer.set(
                result, [d if d.size == s else leaf(s, call.name) for d, s in zip(dims, result.shape, strict=True)]
            )
        else:
            tracer.set(result, [d for i, d in enumerate(dims) if i not in positions])


@rule(
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_max_pool2d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "max_pool2d",
    "adaptive_avg_pool2d",
    "mkldnn_max_pool2d",
)
def pool(call: OpCall) -> None:
    """Batch and channels pass, space is new; along a dim with windows of one entry nothing is pooled."""
    x = call["self"]
    space = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
    same = [x.dim() - space + i for i in range(space) if _window(call, i) == (1, 1, 0)]
    for result in call.results:
        windowed(call.tracer, x, result, x.dim() - space, same)


def _window(call: OpCall, position: int) -> tuple[int, ...]:
    """Return kernel size, stride and padding of a pooling along one of its dims; nothing if it adapts to a size."""
    kernel = call.arguments.get("kernel_size")
    if kernel is None:
        return ()
    settings = kernel, call.arguments.get("stride") or kernel, call.arguments.get("padding") or [0]
    return tuple(values[position] if len(values) > 1 else values[0] for values in settings)
