"""Integers that remember where they came from.

During a trace every integer attribute of every module, and every integer read from a tensor's shape, is a
`TracedInt`: an ``int`` that carries an expression over its sources. When such an integer arrives in a ``reshape``,
the trace knows which attribute (``blocks.3.attn.num_heads``) *is* the size of which axis, and surgery can rewrite
it. A plain number that arrives is a literal: the code cannot follow a cut of that axis.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from secateur.structure.caches import passed_by
from secateur.structure.dims import Dim, size_under
from secateur.structure.inputs import modules_of


@dataclass(frozen=True)
class Attribute:
    """An integer that a module holds: its own attribute, or one of an object that it holds (``config.hidden_size``).

    Attributes:
        module: The module's path.
        name: The attribute's name, with dots if it lies in an object, a list or a dict (``feature_info.0.num_chs``).
        index: Its place, if it stands in a tuple or list.
    """

    module: str
    name: str
    index: int | None = None

    def __str__(self) -> str:
        path = f"{self.module}.{self.name}" if self.module else self.name
        return path if self.index is None else f"{path}[{self.index}]"


@dataclass(frozen=True)
class Operation:
    """An arithmetic operation on two expressions."""

    symbol: str
    left: Expression
    right: Expression


Expression = int | Attribute | Dim | Operation
"""A literal, an attribute, the size of a dim, or arithmetic on those."""

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


def evaluate(expression: Expression, sizes: Mapping[Dim, int], attributes: Mapping[Attribute, int]) -> int:
    """Return the value of an expression under new axis sizes and attribute values.

    Raises:
        ZeroDivisionError: The new sizes make a divisor zero.
        KeyError: An attribute without a value.
    """
    if isinstance(expression, int):
        return int(expression)
    if isinstance(expression, Attribute):
        return attributes[expression]
    if isinstance(expression, Dim):
        return size_under(expression, sizes)
    left = evaluate(expression.left, sizes, attributes)
    right = evaluate(expression.right, sizes, attributes)
    return _OPERATORS[expression.symbol](left, right)


def sources(expression: Expression) -> Iterator[Attribute | Dim]:
    """Yield the attributes and dims that an expression reads."""
    if isinstance(expression, Operation):
        yield from sources(expression.left)
        yield from sources(expression.right)
    elif isinstance(expression, Attribute | Dim):
        yield expression


class Listener:
    """Hears what code does with traced integers beside integer arithmetic; this one forgets it."""

    def read_value(self, expression: Expression) -> None:
        """The value itself matters (``dim ** -0.5``), not only the size it stands for."""

    def find_equal(self, a: Expression, b: Expression) -> None:
        """Two integers were compared, and are equal (``assert channels == self.dim``)."""


class TracedInt(int):
    """An ``int`` that remembers its expression through integer arithmetic, and has a listener."""

    expression: Expression
    listener: Listener

    def __new__(cls, value: int, expression: Expression, listener: Listener) -> TracedInt:
        """Return an integer with its origin."""
        self = super().__new__(cls, value)
        self.expression = expression
        self.listener = listener
        return self

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)  # may leave it to the other one
        if same is True and isinstance(other, TracedInt):
            self.listener.find_equal(self.expression, other.expression)
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other if isinstance(other, TracedInt) else int.__ne__(self, other)

    def __hash__(self) -> int:
        return int.__hash__(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self.listener.read_value(self.expression)
        return int.__pow__(int(self), other)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        self.listener.read_value(self.expression)
        return other ** int(self)

    def __truediv__(self, other: Any) -> Any:
        self.listener.read_value(self.expression)
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.listener.read_value(self.expression)
        return other / int(self)

    def __float__(self) -> float:
        self.listener.read_value(self.expression)
        return float(int(self))


def _arithmetic(symbol: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    compute = _OPERATORS[symbol]

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            if isinstance(other, float):
                self.listener.read_value(self.expression)
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        value = compute(int(left), int(right))
        return TracedInt(value, Operation(symbol, expression_of(left), expression_of(right)), self.listener)

    return method


for _name, _symbol in {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}.items():
    setattr(TracedInt, f"__{_name}__", _arithmetic(_symbol, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(_symbol, reflected=True))


def expression_of(value: int) -> Expression:
    """Return where an integer came from; a plain ``int`` is its own, literal, expression."""
    return value.expression if isinstance(value, TracedInt) else int(value)


@contextmanager
def traced_attributes(model: nn.Module, listener: Listener) -> Iterator[None]:
    """Replace every integer that a module holds by a `TracedInt`, and restore the originals at the end."""
    originals: list[tuple[dict[str, Any], str, Any]] = []
    with passed_by(model, TracedInt):
        try:
            for path, prefix, namespace in _namespaces(model):
                for name, value in list(namespace.items()):
                    traced = _trace_value(path, prefix + name, value, listener)
                    if traced is not value:
                        originals.append((namespace, name, value))
                        namespace[name] = traced
            yield
        finally:
            for namespace, name, value in originals:
                namespace[name] = value


def _namespaces(model: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield module path, prefix and attributes of each module, and of the objects that it holds; shared ones once."""
    seen: set[int] = set()

    def visit(path: str, prefix: str, holder: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        yield path, prefix, vars(holder)
        for name, value in list(vars(holder).items()):
            if not name.startswith("_") and is_settings(value):
                yield from visit(path, f"{prefix}{name}.", value)

    for path, module in modules_of(model):
        yield from visit(path, "", module)


_PLAIN = frozenset({int, float, bool, str, type(None), dict, list, tuple, set})


def is_settings(value: Any) -> bool:
    """Return whether a value is an object that could hold settings: a configuration, a namespace, a dataclass."""
    if type(value) in _PLAIN or isinstance(value, nn.Module | Tensor | type | Enum | ModuleType) or callable(value):
        return False
    return hasattr(value, "__dict__") and not type(value).__module__.startswith("torch")


MOST_SETTINGS = 64
"""A dict with more entries holds data (a vocabulary), not settings."""


def _trace_value(path: str, name: str, value: Any, listener: Listener) -> Any:
    """Return a value with all integers in it traced, in tuples, lists and dicts, too; itself if there are none."""
    if type(value) is int:
        return TracedInt(value, Attribute(path, name), listener)
    if type(value) in (tuple, list):
        items = [
            TracedInt(item, Attribute(path, name, i), listener)
            if type(item) is int
            else _trace_value(path, f"{name}.{i}", item, listener)
            for i, item in enumerate(value)
        ]
        return type(value)(items) if any(map(operator.is_not, items, value)) else value
    if type(value) is dict and len(value) <= MOST_SETTINGS:
        named = {key: item for key, item in value.items() if isinstance(key, str) and "." not in key}
        traced = {key: _trace_value(path, f"{name}.{key}", item, listener) for key, item in named.items()}
        return {**value, **traced} if any(traced[key] is not item for key, item in named.items()) else value
    return value


def held_numbers(model: nn.Module) -> Iterator[tuple[Attribute, int | float]]:
    """Yield every number that a module, or an object that it holds, has as an attribute."""
    for path, prefix, namespace in _namespaces(model):
        for name, value in namespace.items():
            if _is_number(value):
                yield Attribute(path, prefix + name), value
            elif type(value) in (tuple, list) and all(map(_is_number, value)):
                yield from ((Attribute(path, prefix + name, i), item) for i, item in enumerate(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_attribute(model: nn.Module, attribute: Attribute) -> int:
    """Return the present value of an attribute."""
    value: Any = model.get_submodule(attribute.module)
    for name in attribute.name.split("."):
        value = _item(value, name)
    return int(value if attribute.index is None else value[attribute.index])


def write_attribute(model: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute; mutates `model`."""
    path = attribute.name.split(".") + ([] if attribute.index is None else [str(attribute.index)])
    _with(model.get_submodule(attribute.module), path, value)


def _with(holder: Any, path: list[str], value: int) -> Any:
    """Return a holder with another value at a path: a plain container anew, for others may hold it, all else itself."""
    if not path:
        return value
    name, *rest = path
    new = _with(_item(holder, name), rest, value)
    if isinstance(holder, list | tuple):
        return type(holder)(new if i == int(name) else item for i, item in enumerate(holder))
    if isinstance(holder, dict):
        return {**holder, name: new}
    vars(holder)[name] = new  # not by setattr: some configurations are frozen
    return holder


def _item(holder: Any, name: str) -> Any:
    if isinstance(holder, dict):
        return holder[name]
    return holder[int(name)] if isinstance(holder, list | tuple) else getattr(holder, name)
