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
from typing import Any

from torch import nn

from secateur.structure.dims import Dim, size_under


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of a module: ``path`` is ``module.name``, ``index`` its place in a tuple, or None."""

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


class TracedInt(int):
    """An ``int`` that remembers its expression through integer arithmetic.

    As soon as it is used as a real number (``dim ** -0.5``) the value itself matters, not only the size it stands for;
    `on_value_read` is then called with the expression.
    """

    expression: Expression
    on_value_read: Callable[[Expression], None]

    def __new__(cls, value: int, expression: Expression, on_value_read: Callable[[Expression], None]) -> TracedInt:
        """Return an integer with its origin."""
        self = super().__new__(cls, value)
        self.expression = expression
        self.on_value_read = on_value_read
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self.on_value_read(self.expression)
        return int.__pow__(int(self), other)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        self.on_value_read(self.expression)
        return other ** int(self)

    def __truediv__(self, other: Any) -> Any:
        self.on_value_read(self.expression)
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.on_value_read(self.expression)
        return other / int(self)

    def __float__(self) -> float:
        self.on_value_read(self.expression)
        return float(int(self))


def _arithmetic(symbol: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    compute = _OPERATORS[symbol]

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int):
            if isinstance(other, float):
                self.on_value_read(self.expression)
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        value = compute(int(left), int(right))
        return TracedInt(value, Operation(symbol, expression_of(left), expression_of(right)), self.on_value_read)

    return method


for _name, _symbol in {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%"}.items():
    setattr(TracedInt, f"__{_name}__", _arithmetic(_symbol, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(_symbol, reflected=True))


def expression_of(value: int) -> Expression:
    """Return where an integer came from; a plain ``int`` is its own, literal, expression."""
    return value.expression if isinstance(value, TracedInt) else int(value)


@contextmanager
def traced_attributes(model: nn.Module, on_value_read: Callable[[Expression], None]) -> Iterator[None]:
    """Replace every integer attribute of every module by a `TracedInt`, and restore the originals at the end."""
    originals: list[tuple[dict[str, Any], str, Any]] = []
    seen: set[int] = set()
    try:
        for path, module in model.named_modules():
            if id(module) in seen:
                continue
            seen.add(id(module))
            for name, value in list(vars(module).items()):
                traced = _trace_value(path, name, value, on_value_read)
                if traced is not value:
                    originals.append((vars(module), name, value))
                    vars(module)[name] = traced
        yield
    finally:
        for namespace, name, value in originals:
            namespace[name] = value


def _trace_value(path: str, name: str, value: Any, on_value_read: Callable[[Expression], None]) -> Any:
    if type(value) is int:
        return TracedInt(value, Attribute(path, name), on_value_read)
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        items = (TracedInt(item, Attribute(path, name, i), on_value_read) for i, item in enumerate(value))
        return type(value)(items)
    return value


def read_attribute(model: nn.Module, attribute: Attribute) -> int:
    """Return the present value of an attribute."""
    value = getattr(model.get_submodule(attribute.module), attribute.name)
    return int(value if attribute.index is None else value[attribute.index])


def write_attribute(model: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute; mutates `model`."""
    module = model.get_submodule(attribute.module)
    if attribute.index is None:
        setattr(module, attribute.name, value)
    else:
        old = getattr(module, attribute.name)
        items = [value if i == attribute.index else item for i, item in enumerate(old)]
        setattr(module, attribute.name, type(old)(items))
