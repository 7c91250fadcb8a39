"""Names and arguments of ATen operations."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor


@cache
def operation_name(func: Any) -> str:
    """Return the family of an operation: no overload, no in-place underscore; foreign ones keep their namespace."""
    namespace, _, name = func._schema.name.partition("::")
    name = name if name.startswith("__") else name.rstrip("_")
    return name if namespace == "aten" else f"{namespace}::{name}"


@cache
def _parameters(func: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments)


def bind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operation by the names of its schema, defaults included."""
    bound = dict(_parameters(func))
    bound.update(zip(bound, args, strict=False))
    bound.update(kwargs)
    return bound


def rebind(func: Any, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments from arguments by name."""
    arguments = func._schema.arguments
    args = tuple(bound[a.name] for a in arguments if not a.kwarg_only)
    return args, {a.name: bound[a.name] for a in arguments if a.kwarg_only}


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to in place."""
    if not func._schema.is_mutable:
        return []
    bound = bind(func, args, kwargs)
    written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [bound[name] for name in written if isinstance(bound[name], Tensor)]
