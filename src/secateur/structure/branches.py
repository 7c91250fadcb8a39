"""Residual branches: additions of which one operand was computed from the other.

``x + f(x)`` adds a branch to a *stream*. What a stream is follows from the run alone: an operand of an addition from
which the other operand was computed, and the sum itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from secateur.structure.history import ModuleCall
from secateur.structure.tracer import Tracer


@dataclass(frozen=True)
class Addition:
    """The addition of a branch to a stream. Numbers are those of values.

    Attributes:
        total: The sum.
        stream: The operand that is not the branch.
        start: The value of the stream from which the branch was computed.
        branch: The branch.
        argument: Which argument of the addition the branch is.
    """

    total: int
    stream: int
    start: int
    branch: int
    argument: str


def residual_additions(tracer: Tracer) -> list[Addition]:
    """Return the additions of branches in order: between stream and sum, at least one contraction happens."""
    found = []
    previous: dict[int, int] = {}  # sum -> the value of the stream to which a branch was added
    for total, a, b in _sums(tracer):
        for argument, stream, branch in sorted((("other", a, b), ("self", b, a)), key=lambda reading: reading[1]):
            start = _start(tracer, branch, stream, previous)
            if start is not None:
                previous[total] = stream
                found.append(Addition(total, stream, start, branch, argument))
                break
    return found


def _sums(tracer: Tracer) -> Iterator[tuple[int, int, int]]:
    """Yield each sum of two computed values, and the two."""
    for total in tracer.sums:
        a, b = tracer.history.values[total].sources
        if a is not None and b is not None and a != b:
            yield total, a, b


def _start(tracer: Tracer, branch: int, stream: int, previous: Mapping[int, int]) -> int | None:
    """Return the latest value of a stream from which the branch was computed, if by way of a contraction."""
    contracted = False
    for value in tracer.history.before(branch):
        while value < stream:
            if stream not in previous:
                return None
            stream = previous[stream]
        if value == stream:
            return value if contracted else None
        contracted = contracted or tracer.history.values[value].operation in tracer.multiply_adds
    return None


def joined_sums(tracer: Tracer) -> list[int]:
    """Return the sums of two branches that one module computed from one tensor: a shortcut with a projection."""
    return [total for total, *_ in _joined(tracer)]


def projected_additions(tracer: Tracer) -> list[Addition]:
    """Return the joined sums as additions to a stream, which is the side with fewer contractions: the projection."""
    found = []
    for total, start, a, b in _joined(tracer):
        if start is not None and a.contractions != b.contractions:
            stream, branch = sorted((a, b), key=lambda side: side.contractions)
            argument = "self" if branch is a else "other"
            found.append(Addition(total, stream.value, start, branch.value, argument))
    return found


class _Side(NamedTuple):
    """An operand of a joined sum, and by how many contractions its module computed it."""

    value: int
    contractions: int


def _joined(tracer: Tracer) -> Iterator[tuple[int, int | None, _Side, _Side]]:
    """Yield each joined sum, the value from which both of its sides were computed, and these."""
    for total, a, b in _sums(tracer):
        module = tracer.history.values[total].module
        if module is None or module.parent is None:
            continue
        (left, left_start), (right, right_start) = (_within(tracer, value, module) for value in (a, b))
        if left and right and not left & right and left_start == right_start:
            yield total, left_start, _Side(a, len(left)), _Side(b, len(right))


def _within(tracer: Tracer, number: int, module: ModuleCall) -> tuple[set[int], int | None]:
    """Return the contractions by which a module computed a value, and the latest value from outside that it took."""
    contractions: set[int] = set()
    for earlier in tracer.history.before(number):
        operation = tracer.history.values[earlier].operation
        if operation < module.start:
            return contractions, earlier
        if operation in tracer.multiply_adds:
            contractions.add(operation)
    return contractions, None
