"""Movement: operations that only rearrange, cut or join re-express the same dims."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

from torch import Tensor

from secateur.structure.calls import expand_sizes, expanded_like, size_argument, slice_bounds, split_sizes, view_sizes
from secateur.structure.dims import Dim, concat, factors, is_frozen, leaf, product, split
from secateur.structure.rules import rule
from secateur.structure.tracer import OpCall, Tracer


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten")
def view(call: OpCall) -> None:
    """Match runs of input dims with runs of output dims of equal product."""
    tracer, source = call.tracer, call["self"]
    if call.out.numel() == 0 or call.out.dtype != source.dtype:
        return unknown_movement(call)
    dims = regroup(tracer, tracer.dims(source), list(call.out.shape))
    tracer.constrain_all(view_sizes(tracer.call, call.out), dims)
    tracer.follow(call.out, source, dims)


def unknown_movement(call: OpCall) -> None:
    """Freeze both sides of a movement that cannot be followed."""
    reason = f"{call.name} cannot be followed"
    for tensor in call.tensors:
        call.tracer.freeze(call.tracer.dims(tensor), reason)
    for tensor in call.results:
        call.tracer.fresh(tensor, f"{reason} ({call.tracer.where()})")


def regroup(tracer: Tracer, dims: list[Dim], shape: list[int]) -> list[Dim]:
    """Return dims of the new shape over the same axes."""
    result: list[Dim] = []
    old, new = list(dims), list(shape)
    while old or new:
        run_old, run_new = _next_run(old, new)
        if len(run_new) == 1:
            result.append(product(run_old))
            continue
        pieces = [leaf(size) for size in run_new]
        if prod(run_new) > 1:
            tracer.unify(product(run_old), product(pieces))
        result.extend(pieces)
    return result


def _next_run(old: list[Dim], new: list[int]) -> tuple[list[Dim], list[int]]:
    """Take the shortest runs of equal product from the front of both lists; mutates them."""
    run_old, run_new = old[:1], new[:1]
    del old[:1], new[:1]
    size_old, size_new = prod(d.size for d in run_old), prod(run_new)
    while size_old != size_new:
        if size_old < size_new:
            run_old.append(old.pop(0))
            size_old *= run_old[-1].size
        else:
            run_new.append(new.pop(0))
            size_new *= run_new[-1]
    return run_old, run_new


@rule("t", "numpy_T")
def transpose_matrix(call: OpCall) -> None:
    """Reverse the dims."""
    source = call["self"]
    call.tracer.follow(call.out, source, call.tracer.dims(source)[::-1])


@rule("transpose", "swapaxes")
def transpose(call: OpCall) -> None:
    """Swap two dims."""
    source = call["self"]
    dims = list(call.tracer.dims(source))
    if not dims:
        return call.tracer.follow(call.out, source, dims)
    i, j = call["dim0"], call["dim1"]
    dims[i], dims[j] = dims[j], dims[i]
    call.tracer.follow(call.out, source, dims)


@rule("permute")
def permute(call: OpCall) -> None:
    """Reorder the dims."""
    source = call["self"]
    dims = call.tracer.dims(source)
    call.tracer.follow(call.out, source, [dims[i] for i in call["dims"]])


@rule("unsqueeze")
def unsqueeze(call: OpCall) -> None:
    """Insert a dim of size 1."""
    source = call["self"]
    dims = list(call.tracer.dims(source))
    dims.insert(call["dim"] % call.out.dim(), leaf(1))
    call.tracer.follow(call.out, source, dims)


@rule("squeeze")
def squeeze(call: OpCall) -> None:
    """Remove dims of size 1."""
    source = call["self"]
    asked = call.arguments.get("dim")
    positions = range(source.dim()) if asked is None else [asked] if isinstance(asked, int) else asked
    gone = {p % max(source.dim(), 1) for p in positions}
    dims = [d for i, d in enumerate(call.tracer.dims(source)) if i not in gone or d.size != 1]
    call.tracer.follow(call.out, source, dims)


@rule("expand")
def expand(call: OpCall) -> None:
    """Dims of size 1 become new axes whose units are all alike."""
    tracer, source = call.tracer, call["self"]
    written = expand_sizes(tracer.call, source, call.out)
    like = expanded_like(tracer.call)
    old = [leaf(1)] * (call.out.dim() - source.dim()) + tracer.dims(source)
    dims = []
    for dim, size, expression in zip(old, call.out.shape, written, strict=True):
        if dim.size == size:
            tracer.constrain(expression, dim)
            dims.append(dim)
        elif expression is None and like is not None:
            dims.append(tracer.dims(like)[len(dims)])
        elif isinstance(expression, Dim):
            dims.append(expression)  # copies of one value follow whichever axis they were copied for
        else:
            dims.append(leaf(size))
            tracer.use_as("copies", dims[-1])
            tracer.constrain(size if expression is None else expression, dims[-1])
    tracer.follow(call.out, source, dims)


@rule("repeat")
def repeat(call: OpCall) -> None:
    """Each dim becomes copies x itself; the number of copies is a literal."""
    tracer, source, times = call.tracer, call["self"], list(call["repeats"])
    old = [leaf(1)] * (len(times) - source.dim()) + tracer.dims(source)
    dims = [product([leaf(n, f"repeated {n} times"), d]) for n, d in zip(times, old, strict=True)]
    tracer.follow(call.out, source, dims)


@rule("cat", "concat", "concatenate")
def cat(call: OpCall) -> None:
    """The joined dim is the sum of its segments; the other dims are equal."""
    tracer = call.tracer
    tensors = [t for t in call["tensors"] if t.shape != (0,)]
    position = call["dim"] % call.out.dim()
    dims = list(tracer.dims(tensors[0]))
    for tensor in tensors[1:]:
        for i, dim in enumerate(tracer.dims(tensor)):
            if i != position:
                tracer.unify(dims[i], dim)
    dims[position] = concat(tracer.dims(t)[position] for t in tensors)
    tracer.set(call.out, dims)


@rule("stack")
def stack(call: OpCall) -> None:
    """A new frozen dim; the other dims are equal."""
    tracer, tensors = call.tracer, call["tensors"]
    dims = list(tracer.dims(tensors[0]))
    for tensor in tensors[1:]:
        for a, b in zip(dims, tracer.dims(tensor), strict=True):
            tracer.unify(a, b)
    dims.insert(call["dim"] % call.out.dim(), leaf(len(tensors), "stacked tensors"))
    tracer.set(call.out, dims)


@rule("view_as_complex")
def view_as_complex(call: OpCall) -> None:
    """Neighbors become one number: a piece of a wider tensor, and each of its rows, must begin at an even place."""
    tracer, source = call.tracer, call["self"]
    wider = [] if source._base is None else factors(tracer.dims(source._base)[-1])
    for factor in wider:
        if factor.op == "+":
            tracer.keep_multiple(factor, 2)
    tracer.freeze(tracer.dims(source)[-1:], "real and imaginary part")
    tracer.set(call.out, tracer.dims(source)[:-1])


@rule("view_as_real")
def view_as_real(call: OpCall) -> None:
    """A complex number is a pair."""
    tracer = call.tracer
    tracer.set(call.out, [*tracer.dims(call["self"]), leaf(2, "real and imaginary part")])


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def split_dim(call: OpCall) -> None:
    """The pieces are the segments of the dim."""
    tracer, source, results = call.tracer, call["self"], call.results
    position = call["dim"] % source.dim()
    lengths = [result.shape[position] for result in results]
    pieces = split(tracer.dims(source)[position], lengths, tracer.place())
    written = split_sizes(tracer.call, lengths)
    if written is None:
        tracer.equal_counts.append((pieces, tracer.where()))
    else:
        tracer.constrain_all(written, pieces)
    for result, piece in zip(results, pieces, strict=True):
        dims = list(tracer.dims(source))
        dims[position] = piece
        tracer.follow(result, source, dims)


@rule("slice")
def slice_dim(call: OpCall) -> None:
    """A slice is the middle one of three segments."""
    tracer, source = call.tracer, call["self"]
    position, step = call["dim"] % source.dim(), call["step"]
    size, length = source.shape[position], call.out.shape[position]
    dims = list(tracer.dims(source))
    if length != size:
        start = slice(call["start"], call["end"], step).indices(size)[0]
        dims[position] = (
            _segment(tracer, dims[position], start, length) if step == 1 else _strided(tracer, dims[position], length)
        )
    tracer.follow(call.out, source, dims)


def _segment(tracer: Tracer, dim: Dim, start: int, length: int) -> Dim:
    pieces = split(dim, [start, length, dim.size - start - length], tracer.place())
    begin, end = slice_bounds(tracer.call, start, start + length, dim.size)
    tracer.constrain(begin, pieces[0])
    tracer.constrain(end, concat(pieces[:2]))
    return pieces[1]


def _strided(tracer: Tracer, dim: Dim, length: int) -> Dim:
    tracer.freeze([dim], "slice with a step")
    return leaf(length, "slice with a step")


@rule("select")
def select(call: OpCall) -> None:
    """Indexing with a number drops a dim, which cannot be cut."""
    _drop(call, call["dim"])


@rule("unbind")
def unbind(call: OpCall) -> None:
    """Unpacking drops a dim, which cannot be cut."""
    _drop(call, call["dim"])


def _drop(call: OpCall, position: int) -> None:
    tracer, source = call.tracer, call["self"]
    dims = list(tracer.dims(source))
    tracer.freeze([dims.pop(position % source.dim())], "indexed by a number")
    for result in call.results:
        tracer.follow(result, source, dims)


@rule("constant_pad_nd")
def pad(call: OpCall) -> None:
    """Padding adds frozen segments; negative padding cuts some off."""
    tracer, source, widths = call.tracer, call["self"], list(call["pad"])
    dims = list(tracer.dims(source))
    for i in range(len(widths) // 2):
        before, after = widths[2 * i], widths[2 * i + 1]
        position = source.dim() - 1 - i
        if before >= 0 and after >= 0:
            segments = [leaf(before, "padding"), dims[position], leaf(after, "padding")]
            dims[position] = concat(segments) if before or after else dims[position]
        else:
            tracer.freeze([dims[position]], "negative padding")
            dims[position] = leaf(call.out.shape[position], "negative padding")
    tracer.set(call.out, dims)


@rule("pixel_shuffle")
def pixel_shuffle(call: OpCall) -> None:
    """(n, c r r, h, w) -> (n, c, h r, w r): channels are c x r x r."""
    tracer, x, factor = call.tracer, call["self"], call["upscale_factor"]
    *batch, channels, height, width = tracer.dims(x)
    kept = leaf(call.out.shape[-3])
    inner = [leaf(factor, "pixel shuffle"), leaf(factor, "pixel shuffle")]
    tracer.unify(channels, product([kept, *inner]))
    tracer.set(call.out, [*batch, kept, product([height, inner[0]]), product([width, inner[1]])])


@rule("pixel_unshuffle")
def pixel_unshuffle(call: OpCall) -> None:
    """(n, c, h r, w r) -> (n, c r r, h, w)."""
    tracer, x, factor = call.tracer, call["self"], call["downscale_factor"]
    *batch, channels, height, width = tracer.dims(x)
    tracer.freeze([height, width], "spatial")
    inner = [leaf(factor, "pixel unshuffle"), leaf(factor, "pixel unshuffle")]
    space = [leaf(size, "spatial" if size > 1 else "") for size in call.out.shape[-2:]]
    tracer.set(call.out, [*batch, product([channels, *inner]), *space])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: OpCall) -> None:
    """Channels groups x members become members x groups."""
    tracer, x, groups = call.tracer, call["self"], int(call["groups"])
    n, channels, *space = tracer.dims(x)
    group, member = leaf(groups), leaf(x.shape[1] // groups)
    tracer.constrain(size_argument(tracer.call, 1, "groups", groups), group)
    tracer.unify(channels, product([group, member]))
    tracer.set(call.out, [n, product([member, group]), *space])


@rule("flip", "roll", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def reorder(call: OpCall) -> None:
    """The order of the units matters where they are moved about; untouched dims pass."""
    tracer, source = call.tracer, call["self"]
    moved = call.arguments.get("dims") or range(source.dim())
    touched = {p % source.dim() for p in moved}
    if "padding" in call.arguments:
        touched = set(range(source.dim() - len(call["padding"]) // 2, source.dim()))
    dims = list(tracer.dims(source))
    for position in touched:
        if not is_frozen(dims[position]):
            tracer.freeze([dims[position]], "the order of this dim matters")
        if call.out.shape[position] != source.shape[position]:
            dims[position] = leaf(call.out.shape[position], "padding")
    tracer.set(call.out, dims)


@rule(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_nearest3d",
    "upsample_trilinear3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def upsample(call: OpCall) -> None:
    """Batch and channels pass, space is new."""
    windowed(call.tracer, call["self"], call.out, 2)


@rule("im2col")
def im2col(call: OpCall) -> None:
    """(n, c, h, w) -> (n, c x kernel, positions)."""
    tracer, x = call.tracer, call["self"]
    n, channels, *space = tracer.dims(x)
    tracer.freeze(space, "spatial")
    kernel = [leaf(size, "convolution kernel") for size in call["kernel_size"]]
    tracer.set(call.out, [n, product([channels, *kernel]), leaf(call.out.shape[-1], "spatial")])


@rule("col2im")
def col2im(call: OpCall) -> None:
    """(n, c x kernel, positions) -> (n, c, h, w)."""
    tracer, x = call.tracer, call["self"]
    n, columns, positions = tracer.dims(x)
    tracer.freeze([positions], "spatial")
    channels = leaf(call.out.shape[1])
    tracer.unify(columns, product([channels, *(leaf(size, "convolution kernel") for size in call["kernel_size"])]))
    tracer.set(call.out, [n, channels, *(leaf(size, "spatial" if size > 1 else "") for size in call.out.shape[2:])])


def windowed(tracer: Tracer, source: Tensor, result: Tensor, kept: int, same: Collection[int] = ()) -> None:
    """Record a result whose first `kept` dims, and those in `same`, pass; the others are new, spatial ones."""
    dims = tracer.dims(source)
    tracer.freeze([d for i, d in enumerate(dims) if i >= kept and i not in same], "spatial")
    new = [leaf(size, "spatial" if size > 1 else "") for size in result.shape]
    tracer.set(result, [d if i < kept or i in same else new[i] for i, d in enumerate(dims)])
