"""Factories: new tensors whose sizes the model's code wrote down."""

from __future__ import annotations

from secateur.structure.calls import factory_sizes
from secateur.structure.rules import rule
from secateur.structure.tracer import OpCall


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def uniform(call: OpCall) -> None:
    """All entries are alike, so the axes are free, as long as the code can follow their sizes."""
    dims = call.tracer.fresh(call.out)
    call.tracer.constrain_all(factory_sizes(call.tracer.call, call.out), dims)


@rule("arange", "linspace", "eye", "rand", "randn", "randperm", "tril_indices", "triu_indices")
def ordered(call: OpCall) -> None:
    """Entries differ by position: a cut would take other values."""
    call.tracer.fresh(call.out, f"values of {call.name} depend on the position")


@rule("rand_like", "randn_like", "bernoulli")
def random_like(call: OpCall) -> None:
    """Random values change with the size; in training nobody expects the same ones again."""
    source = call.tensors[0]
    if call.tracer.training:
        call.tracer.set(call.out, call.tracer.dims(source))
    else:
        call.tracer.fresh(call.out, "random values")


@rule("tril", "triu")
def triangle(call: OpCall) -> None:
    """The last two dims keep their order."""
    dims = call.tracer.dims(call["self"])
    call.tracer.freeze(dims[-2:], "triangular")
    call.tracer.set(call.out, dims)


@rule(
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "_assert_async",
    "_assert_scalar",
    "sym_size",
    "sym_numel",
    "sym_stride",
    "is_same_size",
    "equal",
)
def scalar(call: OpCall) -> None:
    """A number leaves the graph; nothing is said about dims."""
