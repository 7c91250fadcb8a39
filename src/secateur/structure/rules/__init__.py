"""The rules: what each ATen operation says about dims. One file per kind of operation.

A rule is keyed by the name of an operation family (no overload, no trailing underscore). An operation without a rule
freezes everything that it touches: a model with a strange operation is pruned less, never wrongly.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from secateur.structure.tracer import OpCall

Rule = Callable[[OpCall], None]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in _RULES:
                raise ValueError(f"The operation {name!r} has two rules.")
            _RULES[name] = function
        return function

    return register


@cache
def all_rules() -> dict[str, Rule]:
    """Return every rule by the name of its operation."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return _RULES


def apply_rule(call: OpCall) -> None:
    """Let an operation speak; freeze what an unknown one touches, and units of which it uses the indices otherwise."""
    tracer, arguments = call.tracer, call.tensors
    tracer.followed.clear()
    _apply(call)
    new = [tensor for tensor in call.results if all(tensor is not other for other in arguments)]
    if not any(tensor in tracer.meaning_of for tensor in new):
        lost = [tensor for tensor in arguments if all(tensor is not other for other in tracer.followed)]
        tracer.keep_order(lost, f"rows are assigned to units by value, and {call.name} uses which")


def _apply(call: OpCall) -> None:
    known = all_rules().get(call.name)
    reason = f"no rule for the operation {call.name}"
    if known is not None:
        try:
            return known(call)
        except Exception as error:  # a form of the operation that nobody thought of must not stop the user
            reason = f"the rule for {call.name} does not know this form of it ({type(error).__name__}: {error})"
    for tensor in call.tensors:
        call.tracer.freeze(call.tracer.dims(tensor), reason)
    for tensor in call.results:
        call.tracer.fresh(tensor, f"{reason} ({call.tracer.where()})")
