"""Broken versions of the rules, made systematically from their source.

Each top-level function of a rule file is taken apart as a syntax tree, and every place that a kind of mistake fits is
changed, one at a time: a statement left out, two dims swapped, a number off by one, a condition turned around. A mutant
is put in force by exchanging the code of the live function, so whoever has imported it runs the broken version.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from secateur.structure import rules


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        file: Name of the rule file.
        function: The function that is wrong.
        lines: Lines of the statement that is changed.
        kind: The kind of mistake.
        change: What was written, and what is.
    """

    file: str
    function: str
    lines: range
    kind: str
    change: str
    code: CodeType = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.file}:{self.lines.start} {self.function}: {self.kind}: {self.change}"


def rule_files() -> list[ModuleType]:
    return [importlib.import_module(f"{rules.__name__}.{found.name}") for found in pkgutil.iter_modules(rules.__path__)]


@cache
def all_mutants() -> tuple[Mutant, ...]:
    return tuple(mutant for module in rule_files() for mutant in _mutants_of(module))


@contextmanager
def in_force(mutant: Mutant) -> Iterator[None]:
    """Run the block with a broken rule."""
    function: FunctionType = getattr(importlib.import_module(f"{rules.__name__}.{mutant.file}"), mutant.function)
    original = function.__code__
    function.__code__ = mutant.code
    try:
        yield
    finally:
        function.__code__ = original


def executable_lines(module: ModuleType) -> set[int]:
    """The lines of the functions of a rule file."""
    return {
        line
        for function in _functions(module)
        for code in _codes(getattr(module, function.name).__code__)
        for _, _, line in code.co_lines()
        if line is not None and line > code.co_firstlineno
    }


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _functions(module: ModuleType) -> list[ast.FunctionDef]:
    tree = ast.parse(inspect.getsource(module))
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def _mutants_of(module: ModuleType) -> Iterator[Mutant]:
    for function in _functions(module):
        function.decorator_list = []
        for number, node in enumerate(ast.walk(function)):
            node.number = number  # type: ignore[attr-defined]
        for statement, node in _places(function):
            for kind, changed in _mistakes(node):
                broken = _Exchange(node.number, changed).visit(copy.deepcopy(function))
                yield Mutant(
                    file=module.__name__.rpartition(".")[2],
                    function=function.name,
                    lines=_header(statement),
                    kind=kind,
                    change=f"{ast.unparse(node)} -> {ast.unparse(changed)}",
                    code=_compiled(broken, module),
                )


def _compiled(function: ast.FunctionDef, module: ModuleType) -> CodeType:
    tree = ast.fix_missing_locations(
        ast.Module([ast.parse("from __future__ import annotations").body[0], function], [])
    )
    namespace: dict[str, Any] = dict(vars(module))
    exec(compile(tree, module.__file__ or "", "exec"), namespace)
    code: CodeType = namespace[function.name].__code__
    return code


def _header(statement: ast.stmt) -> range:
    """The lines of a simple statement, or of the head of a compound one."""
    body = getattr(statement, "body", None)
    return range(statement.lineno, body[0].lineno if body else (statement.end_lineno or statement.lineno) + 1)


def _places(function: ast.FunctionDef) -> Iterator[tuple[ast.stmt, Any]]:
    """Every node of the function's body with the statement that it belongs to."""

    def visit(node: ast.AST, statement: ast.stmt) -> Iterator[tuple[ast.stmt, Any]]:
        if isinstance(node, ast.JoinedStr) or _only_names_roles(node):
            return
        yield statement, node
        for child in ast.iter_child_nodes(node):
            yield from visit(child, child if isinstance(child, ast.stmt) else statement)

    for statement in function.body[1:] if ast.get_docstring(function) else function.body:
        yield from visit(statement, statement)


def _only_names_roles(node: ast.AST) -> bool:
    """Roles say what an axis is for; which cuts are right does not depend on them."""
    if isinstance(node, ast.If):
        return all(_only_names_roles(inner) for inner in [*node.body, *node.orelse])
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value) == "use_as"


class _Exchange(ast.NodeTransformer):
    def __init__(self, number: int, changed: ast.AST) -> None:
        self.number, self.changed = number, changed

    def visit(self, node: ast.AST) -> Any:
        return self.changed if getattr(node, "number", None) == self.number else self.generic_visit(node)


# ------------------------------------------------------------------------------------------------ kinds of mistakes


def _mistakes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield f"{_name(node.value)} dropped", ast.Pass()
    if isinstance(node, ast.List | ast.Tuple) and not _strings(node):
        yield from _swapped(node)
    if isinstance(node, ast.Tuple) and _strings(node):
        yield from _left_out(node)
    if isinstance(node, ast.Call):
        yield from _wrong_call(node)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        for other in (node.value + 1, node.value - 1):
            yield "number off by one", ast.Constant(other)
    if isinstance(node, ast.If | ast.IfExp):
        turned = copy.copy(node)
        turned.test = ast.UnaryOp(ast.Not(), node.test)
        yield "condition turned around", turned
    if isinstance(node, ast.comprehension) and node.ifs:
        turned_for = copy.copy(node)
        turned_for.ifs = [ast.UnaryOp(ast.Not(), test) for test in node.ifs]
        yield "condition turned around", turned_for


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def _strings(node: ast.List | ast.Tuple) -> bool:
    return all(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in node.elts)


def _swapped(node: ast.List | ast.Tuple) -> Iterator[tuple[str, ast.AST]]:
    for j in range(len(node.elts)):
        for i in range(j):
            other = copy.copy(node)
            other.elts = list(node.elts)
            other.elts[i], other.elts[j] = node.elts[j], node.elts[i]
            yield "two swapped", other


def _left_out(node: ast.Tuple) -> Iterator[tuple[str, ast.AST]]:
    for i in range(len(node.elts)):
        yield "one name left out", ast.Tuple([*node.elts[:i], *node.elts[i + 1 :]], node.ctx)


def _wrong_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = _name(node)
    if name in ("set", "follow") and isinstance(node.func, ast.Attribute):
        yield "result forgotten", ast.Call(ast.Attribute(node.func.value, "fresh", ast.Load()), node.args[:1], [])
    if name in ("set", "follow", "product", "concat") and node.args and not isinstance(node.args[-1], ast.List):
        for pattern in ("list(x)[::-1]", "[*list(x)[:2][::-1], *list(x)[2:]]", "[*list(x)[:-2], *list(x)[:-3:-1]]"):
            changed = ast.parse(pattern, mode="eval").body
            filled = _Fill(node.args[-1]).visit(changed)
            yield "dims reordered", ast.Call(node.func, [*node.args[:-1], filled], node.keywords)
    if name in ("leaf", "fresh") and len(node.args) == 2:
        yield "freeze left out", ast.Call(node.func, node.args[:1], node.keywords)


class _Fill(ast.NodeTransformer):
    def __init__(self, value: ast.expr) -> None:
        self.value = value

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.value if node.id == "x" else node
