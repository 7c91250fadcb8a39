"""Functions that remember their results (``functools.lru_cache``), while integers remember where they come from.

A traced integer is equal to every other one of its value. So a cache would answer with what it has computed for another
layer, or before the trace, and a size would seem to come from there (einops keeps all its shapes in such a cache).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from secateur.structure.inputs import modules_of

_NO_MODELS = frozenset({*sys.stdlib_module_names, "torch", "numpy", "sympy", "secateur"})
"""Packages whose caches never answer with a size that a model's code has read."""


@contextmanager
def passed_by(model: nn.Module, kind: type) -> Iterator[None]:
    """Let no cache see arguments of one kind, in any package and in the classes of `model`: they are computed anew."""
    classes = {base for _, module in modules_of(model) for base in type(module).__mro__}
    owners = [owner for owner in (*sys.modules.values(), *classes) if isinstance(owner, ModuleType | type)]
    found = [(owner, *each) for owner in owners for each in _cached_functions(owner, len(vars(owner)), kind)]
    replaced = [each for each in found if vars(each[0]).get(each[1]) is each[2]]
    try:
        for owner, name, _, passing_by in replaced:
            setattr(owner, name, passing_by)
        yield
    finally:
        for owner, name, cached, _ in replaced:
            setattr(owner, name, cached)


@functools.cache
def _cached_functions(owner: ModuleType | type, size: int, kind: type) -> tuple[tuple[str, Any, Any], ...]:
    """Return the functions in a module or class that remember results: name, function, and what passes it by.

    An owner that has grown, by its number of names, is searched anew.
    """
    place = owner.__name__ if isinstance(owner, ModuleType) else owner.__module__
    if place.partition(".")[0] in _NO_MODELS:
        return ()
    found = [(name, own) for name, own in vars(owner).items() if isinstance(own, functools._lru_cache_wrapper)]
    return tuple((name, own, _passing_by(own, kind)) for name, own in found)


def _passing_by(cached: Any, kind: type) -> Callable[..., Any]:
    @functools.wraps(cached)
    def function(*args: Any, **kwargs: Any) -> Any:
        return (cached.__wrapped__ if _holds(kind, (args, *kwargs.values())) else cached)(*args, **kwargs)

    vars(function).update(cache_clear=cached.cache_clear, cache_info=cached.cache_info)
    return function


def _holds(kind: type, value: Any) -> bool:
    return isinstance(value, kind) or (isinstance(value, tuple) and any(_holds(kind, item) for item in value))
