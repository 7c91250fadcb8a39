"""What ran in a trace, in order: which value was computed from which, and which module was running."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from secateur.structure.inputs import held_tensors


def first_tensor(output: Any) -> Tensor | None:
    """Return what a module returned if it is a tensor, or the tensor that a tuple or list begins with; else None."""
    if type(output) in (tuple, list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


@dataclass(eq=False)
class ModuleCall:
    """One call of a module: it ran the operations from number `start` up to, not including, `stop`.

    Attributes:
        name: The module's path.
        number: Which call it is in the history.
        parent: The call that it is a part of.
        last: The number of the last call that is a part of it.
        entries: Length of the tuple or list that it returned; None if it returned a tensor; 0 if neither, or if no
            tensor comes first.
        filled: The arguments that hold something that the call has computed: caches.
    """

    name: str
    number: int
    parent: ModuleCall | None
    start: int
    stop: int = 0
    last: int = 0
    entries: int | None = 0
    filled: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Value:
    """A tensor that was computed.

    Attributes:
        operation: The number of the operation that computed it; -1 for the run's inputs.
        sources: The values that the operation took, by argument; None for parameters and constants.
        module: The innermost module call that ran the operation.
    """

    operation: int
    sources: tuple[int | None, ...] = ()
    module: ModuleCall | None = None


@dataclass
class History:
    """The values of a run, numbered in the order in which they were computed, and the calls of modules.

    A tensor that is written to becomes a new value.
    """

    values: list[Value] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    operations: int = 0
    _value_of: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    _inside: list[ModuleCall] = field(default_factory=list)

    def begin(self, inputs: Iterable[Tensor]) -> None:
        """Note the run's inputs."""
        for tensor in inputs:
            self._append(tensor, Value(-1))

    def add(self, arguments: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Note an operation."""
        sources = tuple(self._value_of.get(tensor) for tensor in arguments)
        module = self._inside[-1] if self._inside else None
        for tensor in results:
            self._append(tensor, Value(self.operations, sources, module))
        self.operations += 1

    def _append(self, tensor: Tensor, value: Value) -> None:
        self._value_of[tensor] = len(self.values)
        self.values.append(value)

    def enter(self, name: str) -> None:
        """Note that a module begins."""
        parent = self._inside[-1] if self._inside else None
        self._inside.append(ModuleCall(name, len(self.calls), parent, self.operations))
        self.calls.append(self._inside[-1])

    def leave(self, arguments: Iterable[Any], output: Any) -> None:
        """Note that the innermost module ends."""
        call = self._inside.pop()
        call.filled = tuple(a for a in arguments if not isinstance(a, Tensor) and self._holds_since(a, call.start))
        call.stop, call.last = self.operations, len(self.calls) - 1
        if first_tensor(output) is not None:
            call.entries = None if isinstance(output, Tensor) else len(output)

    def _holds_since(self, container: Any, start: int) -> bool:
        """Return whether a container or an object holds a tensor that was computed at `start` or later."""
        numbers = (self._value_of.get(tensor) for tensor in held_tensors(container))
        return any(number is not None and self.values[number].operation >= start for number in numbers)

    def within(self, call: ModuleCall) -> list[ModuleCall]:
        """Return a call and all calls that are parts of it."""
        return self.calls[call.number : call.last + 1]

    def depends_on_inputs(self, tensor: Tensor) -> bool:
        """Return whether a tensor is an input of the run, or was computed from one."""
        number = self._value_of.get(tensor)
        return number is not None and any(self.values[n].operation == -1 for n in self.before(number))

    def before(self, number: int) -> Iterator[int]:
        """Yield a value and all that it was computed from, latest first."""
        waiting, seen = [-number], {number}
        while waiting:
            latest = -heapq.heappop(waiting)
            yield latest
            for source in self.values[latest].sources:
                if source is not None and source not in seen:
                    seen.add(source)
                    heapq.heappush(waiting, -source)
