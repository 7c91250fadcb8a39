"""Recurrence: gates are segments of one dim, and hidden units feed back into all of them."""

from __future__ import annotations

from secateur.structure.dims import leaf, product
from secateur.structure.rules import rule
from secateur.structure.tracer import OpCall


@rule("mkldnn_rnn_layer")
def lstm_layer(call: OpCall) -> None:
    """Input (t, n, i), kernels (gates x h, i) and (gates x h, h), states (n, h) -> (t, n, h) and both states."""
    tracer, x = call.tracer, call["input"]
    first, recurrent = call["weight0"], call["weight1"]
    hidden = tracer.dims(recurrent)[1]
    tracer.use_as("recurrent", hidden)
    for name in ("weight0", "weight1", "weight2", "weight3"):
        gates = leaf(call[name].shape[0] // hidden.size, "gates")
        tracer.unify(tracer.dims(call[name])[0], product([gates, hidden]))
    for name in ("hx_", "cx_"):
        tracer.unify(tracer.dims(call[name])[-1], hidden)
    steps, batch, _ = tracer.dims(x)
    tracer.freeze([steps], "steps in time")
    tracer.contract(("input", x, 2), ("weight0", first, 1))
    tracer.consume("weight1", recurrent, [1])
    tracer.cost(steps, batch, *tracer.dims(first))
    tracer.cost(steps, batch, *tracer.dims(recurrent))
    for result in call.results:
        tracer.set(result, [*([steps, batch] if result.dim() == 3 else [batch]), hidden])
