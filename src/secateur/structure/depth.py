"""Depth: a residual branch is a unit of size 1, and dropping it replaces the branch by zero.

Physically, the modules that compute a branch between the stream and the addition are replaced by modules that return
zeros. Which modules these are follows from the run: those that ran in between, hold parameters, and compute nothing
that is used elsewhere. Whether that is enough is never assumed: like every cut it is proved against the masked network,
in which the operand of the addition is zero.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import prod
from typing import Any

from torch import nn

from secateur.structure.branches import Addition, projected_additions, residual_additions
from secateur.structure.dims import Dim, leaf
from secateur.structure.history import History, ModuleCall
from secateur.structure.tracer import Site, Tracer


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    Attributes:
        name: The modules that compute it.
        modules: Their paths, each with the length of the tuple that it returns (None: a tensor).
        tensors: Their parameters and buffers.
        gate: The parameters of the last of them, in which the branch is linear, as in a factor in front of it.
        macs: Their multiply-adds in the traced call.
        prunable: Whether it may be dropped.
        reason: Why not, if not.
    """

    name: str
    modules: tuple[tuple[str, int | None], ...]
    tensors: tuple[str, ...]
    gate: tuple[str, ...]
    macs: int
    prunable: bool
    reason: str
    leaf: Dim = field(repr=False, compare=False)


BESIDE_A_PROJECTION = "a branch whose shortcut is a projection stays: without it the projection alone would be left"

Computed = tuple[Addition, tuple[ModuleCall, ...]]
"""The addition of a branch, and the calls of the modules that compute the branch."""


def find_branches(model: nn.Module, tracer: Tracer) -> tuple[Branch, ...]:
    """Return the residual branches in order, and let the additions be sites where they are consumed."""
    runs = _Runs(model, tracer.history)
    droppable = _blocks(residual_additions(tracer), runs, tracer.history)
    inside = [call for _, calls in droppable for call in calls]
    beside = [
        (addition, calls)
        for addition, calls in _blocks(projected_additions(tracer), runs, tracer.history)
        if not _meet(tracer.history, [(addition, calls)], inside) and not _meet(tracer.history, droppable, calls)
    ]
    branches: dict[int, Branch] = {}
    caches: list[Any] = []
    for addition, calls in droppable:
        branch = _branch(runs.modules, tracer, calls, _obstacle(calls, caches))
        operation = tracer.history.values[addition.total].operation
        tracer.sites[operation].append(Site(addition.argument, 0, branch.leaf))
        branches[operation] = branch
    for addition, calls in beside:
        operation = tracer.history.values[addition.total].operation
        branches[operation] = _branch(runs.modules, tracer, calls, BESIDE_A_PROJECTION)
    return tuple(branches[operation] for operation in sorted(branches))


def _blocks(additions: Sequence[Addition], runs: _Runs, history: History) -> list[Computed]:
    found = [(addition, runs.computing(addition)) for addition in additions]
    return _disjoint([each for each in found if each[1]], history)


def _meet(history: History, sums: Sequence[Computed], calls: Sequence[ModuleCall]) -> bool:
    """Return whether one of the sums happens within one of the calls."""
    operations = [history.values[addition.total].operation for addition, _ in sums]
    return any(call.start <= operation < call.stop for call in calls for operation in operations)


def _disjoint(found: Sequence[Computed], history: History) -> list[Computed]:
    """Return branches that do not contain each other: blocks rather than parts of blocks, or stacks of blocks."""
    operations = [history.values[addition.total].operation for addition, _ in found]
    inner: dict[Addition, list[Addition]] = {}
    for outer, calls in found:
        spans = ((bisect_left(operations, call.start), bisect_left(operations, call.stop)) for call in calls)
        inner[outer] = [addition for first, last in spans for addition, _ in found[first:last]]
    blocks = [(addition, calls) for addition, calls in found if len(inner[addition]) < 2]
    parts = {part for addition, _ in blocks for part in inner[addition]}
    return [(addition, calls) for addition, calls in blocks if addition not in parts]


def _obstacle(calls: Sequence[ModuleCall], caches: list[Any]) -> str:
    """Return why a branch must stay, or ""; adds the caches that it fills to those that are known."""
    for call in calls:
        new = [cache for cache in call.filled if not any(cache is known for known in caches)]
        caches.extend(new)
        if new:
            return f"{call.name} is the first to fill a {type(new[0]).__name__}, which is asked for its length there"
        if call.entries == 0:
            return f"{call.name} returns neither a tensor nor a tuple that begins with one"
    return ""


def _branch(inside: dict[str, nn.Module], tracer: Tracer, calls: Sequence[ModuleCall], obstacle: str) -> Branch:
    modules = {call.name: inside[call.name] for call in calls}
    layers = (c for call in calls for c in tracer.history.within(call) if c.name in inside and _own(inside[c.name]))
    gate = max(layers, key=lambda c: c.start)
    costs = [dims for call in calls for i in range(call.start, call.stop) for dims in tracer.multiply_adds.get(i, ())]
    return Branch(
        name=_joined(list(modules)),
        modules=tuple((call.name, call.entries) for call in calls),
        tensors=tuple(f"{path}.{name}" for path, module in modules.items() for name in _tensors(module)),
        gate=tuple(f"{gate.name}.{name}" for name in _own(inside[gate.name])),
        macs=sum(prod(dim.size for dim in dims) for dims in costs),
        prunable=not obstacle,
        reason=obstacle,
        leaf=leaf(1),
    )


def _own(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _tensors(module: nn.Module) -> Iterator[str]:
    for named in (module.named_parameters(), module.named_buffers()):
        yield from (name for name, _ in named)


def _joined(paths: Sequence[str]) -> str:
    """Return one name for several modules: ``layer1.0.{conv1,bn1}``."""
    if len(paths) == 1:
        return paths[0]
    split = [path.split(".") for path in paths]
    levels = zip(*(parts[:-1] for parts in split), strict=False)
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels)]
    return ".".join([*common, "{" + ",".join(".".join(parts[len(common) :]) for parts in split) + "}"])


class _Runs:
    """Tells which calls of modules compute a branch, and nothing else."""

    def __init__(self, model: nn.Module, history: History) -> None:
        self._history = history
        self.modules = dict(model.named_modules())
        self._operations = [value.operation for value in history.values]
        self._users: dict[int, list[int]] = defaultdict(list)
        for number, value in enumerate(history.values):
            for source in value.sources:
                if source is not None:
                    self._users[source].append(number)
        self._times = Counter(call.name for call in history.calls)
        self._places: dict[int, list[str]] = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._places[id(parameter)].append(name)

    def computing(self, addition: Addition) -> tuple[ModuleCall, ...]:
        """Return the outermost calls between the stream and the sum that belong to the branch alone."""
        needed = set()
        for number in self._history.before(addition.branch):
            if number <= addition.start:
                break
            needed.add(self._operations[number])
        calls = self._between(self._operations[addition.start] + 1, self._operations[addition.total])
        return tuple(
            call
            for call in calls
            if not needed.isdisjoint(range(call.start, call.stop))
            and self._holds_parameters_alone(call)
            and not self._escapes(call, addition)
        )

    def _between(self, start: int, stop: int) -> Iterator[ModuleCall]:
        """Yield the outermost calls that ran within a range of operations."""
        inside: set[ModuleCall] = set()
        calls = self._history.calls
        for number in range(bisect_left(calls, start, key=lambda call: call.start), len(calls)):
            call = calls[number]
            if call.start >= stop:
                return
            if call.stop <= stop:
                if call.parent not in inside:
                    yield call
                inside.add(call)

    def _holds_parameters_alone(self, call: ModuleCall) -> bool:
        """Return whether the module has parameters, runs once, and shares nothing with other modules.

        Modules that are no part of the model, such as an activation that is shared by many models, may run often.
        """
        if call.name not in self.modules:
            return False
        prefix = f"{call.name}."
        places = [self._places[id(parameter)] for parameter in self.modules[call.name].parameters()]
        inner = Counter(each.name for each in self._history.within(call) if each.name in self.modules)
        return (
            bool(places)
            and all(name.startswith(prefix) for names in places for name in names)
            and all(self._times[name] == n for name, n in inner.items())
            and inner[call.name] == 1
        )

    def _escapes(self, call: ModuleCall, addition: Addition) -> bool:
        """Return whether something that the call computed is used other than by way of the branch."""
        first, last = (bisect_left(self._operations, operation) for operation in (call.start, call.stop))
        waiting, seen = list(range(first, last)), set(range(first, last)) | {addition.total}
        while waiting:
            for user in self._users[waiting.pop()]:
                if user > addition.total or user == addition.stream:
                    return True
                if user not in seen:
                    seen.add(user)
                    waiting.append(user)
        return False
