"""Routing: rows are assigned to units by value, as in mixtures of experts.

Which units are chosen is data. The rules follow it from the choice to the product with the weights of those units, so
that the units that can be chosen and the units that have weights are one axis. Any other use of it freezes that axis.
"""

from __future__ import annotations

from secateur.structure.calls import size_argument
from secateur.structure.dims import leaf
from secateur.structure.provenance import Operation
from secateur.structure.rules import rule
from secateur.structure.rules.normalization import ordered
from secateur.structure.tracer import OpCall

_INF = float("inf")


@rule("topk")
def topk(call: OpCall) -> None:
    """The largest units, in the order of their values; units that cannot be chosen could as well be absent."""
    tracer, x, number = call.tracer, call["self"], int(call["k"])
    position = call["dim"] % x.dim()
    dims = list(tracer.dims(x))
    units = dims[position]
    tracer.consume("self", x, [position], -_INF if call["largest"] else _INF)
    tracer.choose(units, number)
    dims[position] = leaf(number, "chosen units")
    values, indices = call.results
    tracer.set(values, dims)
    tracer.set(indices, dims)
    tracer.mean(indices, "index", units)


@rule("sort")
def sort(call: OpCall) -> None:
    """The order of the entries changes; what they name does not."""
    ordered(call)
    units = call.tracer.meant(call["self"], "index")
    if units is not None:
        call.tracer.mean(call.out, "index", units)


@rule("histc")
def histogram(call: OpCall) -> None:
    """One bin for each unit counts how often it is named."""
    tracer, bins, last = call.tracer, int(call["bins"]), call["max"]
    units = tracer.meant(call["self"], "index")
    if units is None or (bins, call["min"], last) != (units.size, 0, units.size - 1):
        tracer.freeze(tracer.dims(call["self"]), "counted by value")
        tracer.fresh(call.out, "bins")
        return
    tracer.constrain(size_argument(tracer.call, 1, "bins", bins), units)
    tracer.constrain(Operation("+", size_argument(tracer.call, 3, "max", int(last)), 1), units)
    tracer.set(call.out, [units])
    tracer.mean(call.out, "count", units)


@rule("cumsum")
def cumulative_sum(call: OpCall) -> None:
    """Sums of counts say where the rows of each unit end; other cumulative sums depend on the order."""
    tracer, x = call.tracer, call["self"]
    units = tracer.meant(x, "count")
    if units is None:
        return ordered(call)
    tracer.set(call.out, tracer.dims(x))
    tracer.mean(call.out, "end", units)
