"""Whether a broken rule is caught: the fixtures, what the sound rules say about them, and the verdict on a mutant."""

from __future__ import annotations

import importlib
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from random import Random
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from tests.structure.blocks import BLOCKS
from tests.structure.blocks.networks import network
from tests.structure.cuts import random_cut, runs_a_statistic
from tests.structure.mutation.mutants import Mutant, in_force
from tests.structure.mutation.operations import cases
from torch import nn

import secateur as sc
from secateur.structure import rules
from secateur.structure.dims import Dim, flat, unit_index
from secateur.structure.plan import Plan
from secateur.structure.prove import prove_cut
from secateur.structure.structure import Kept
from secateur.structure.surgery import cut_copy, make_plan
from secateur.structure.tracer import OpCall
from secateur.testing.oracle import oracle_error

tracing = importlib.import_module("secateur.structure.trace")  # the package has a function of that name

VERDICTS = ("verify", "proof", "cost", "silent", "freer", "frozen", "stumbles", "same")
"""What became of a mutant.

Caught: by `verify`; only by the proof of another cut; only by counting multiply-adds. A silent one allows a cut that
nothing has refused and nothing has shown to be right. The others did no harm: one allows cuts that the sound rules
refuse, but which are right; one allows fewer cuts; one raises an error, which freezes what the operation touches; one
says the same.
"""
CAUGHT = VERDICTS[:3]


@dataclass(frozen=True)
class Fixture:
    """A network and what the sound rules say about it."""

    name: str
    model: nn.Module
    inputs: Any
    structure: sc.Structure
    text: str
    lines: frozenset[tuple[str, int]]


@cache
def fixtures() -> tuple[Fixture, ...]:
    """Every operation, and every kind of block in a few variants."""
    return tuple(_fixture(*case) for case in _networks())


def _networks() -> Iterator[tuple[str, nn.Module, Any]]:
    yield from cases()
    for name, block in BLOCKS.items():
        for seed in range(2):
            yield f"{name} {seed}", *network(block.form, 4 + seed % 2, [name], seed, batch=4 if seed % 2 else 2)


def _fixture(name: str, model: nn.Module, inputs: Any) -> Fixture:
    lines: set[tuple[str, int]] = set()
    with _watched(lines):
        structure = sc.trace(model, inputs)
    return Fixture(name, model, inputs, structure, text_of(structure), frozenset(lines))


@contextmanager
def _watched(lines: set[tuple[str, int]]) -> Iterator[None]:
    """Note which lines of rule files run."""
    folder = rules.__path__[0]

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        lines.add((frame.f_code.co_filename.rpartition("/")[2].removesuffix(".py"), frame.f_lineno))
        return local

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(folder) else None

    def apply_rule(call: OpCall) -> None:
        before = sys.gettrace()
        sys.settrace(watch)
        try:
            rules.apply_rule(call)
        finally:
            sys.settrace(before)

    with patch.object(tracing, "apply_rule", apply_rule):
        yield


def text_of(structure: sc.Structure) -> str:
    """Everything that a structure says but the reasons, in a form that can be compared."""
    numbers: dict[Dim, int] = {}

    def text(dim: Dim) -> str:
        dim = dim.find()
        if dim.op:
            return f"({dim.op.join(text(part) for part in flat(dim, dim.op))})"
        return f"{numbers.setdefault(dim, len(numbers))}:{dim.size}"

    tensors = [(name, [text(dim) for dim in dims]) for name, dims in structure.tensors.items()]
    free = [(axis.name, text(axis.leaf), axis.prunable) for axis in structure.axes]
    sites = [(n, [(s.argument, s.position, text(s.dim), s.fill) for s in sites]) for n, sites in structure.path]
    costs = [[text(dim) for dim in dims] for dims in structure.multiply_adds]
    consumers = {name: [text(dim) for dim in dims] for name, dims in structure.consumers.items()}
    attributes = {str(attribute): text(dim) for attribute, dim in structure.attributes.items()}
    return repr((tensors, free, structure.ties, structure.steps, sites, costs, consumers, attributes))


# --------------------------------------------------------------------------------------------------------- verdicts


FIRST = 10
"""So many networks are looked at first, spread over all that reach a rule; the others where those catch nothing."""


def verdict(mutant: Mutant) -> tuple[str, str]:
    """Return the best verdict on a mutant, and the network that gave it."""
    reaching = [f for f in fixtures() if any((mutant.file, line) in f.lines for line in mutant.lines)]
    reaching.sort(key=lambda fixture: len(fixture.lines))  # those that run little else first
    step = max(1, -(-len(reaching) // FIRST))
    first = _verdict(mutant, reaching[::step])
    if first[0] in CAUGHT:
        return first
    rest = _verdict(mutant, [fixture for i, fixture in enumerate(reaching) if i % step])
    return min(first, rest, key=lambda found: VERDICTS.index(found[0]))


def _verdict(mutant: Mutant, networks: list[Fixture]) -> tuple[str, str]:
    changed = []
    for fixture in networks:
        try:
            structure = _broken(mutant, fixture)
        except _Endless:
            return "stumbles", fixture.name
        if structure is None:
            changed.append((fixture, None))
        elif text_of(structure) != fixture.text:
            if not _passes(structure, fixture):
                return "verify", fixture.name
            changed.append((fixture, None if _stumbles(structure) and not _stumbles(fixture.structure) else structure))
    best = "same", "no network"
    for fixture, structure in changed[:12]:
        found = "stumbles" if structure is None else _judge(structure, fixture)
        if VERDICTS.index(found) < VERDICTS.index(best[0]):
            best = found, fixture.name
        if found == "proof":
            break
    return best


def _broken(mutant: Mutant, fixture: Fixture) -> sc.Structure | None:
    """Return what the broken rules say about a network; None if the trace fails."""
    try:
        with in_force(mutant), _limited(seconds=1):
            return sc.trace(fixture.model, fixture.inputs)
    except Exception:
        return None


def _passes(structure: sc.Structure, fixture: Fixture) -> bool:
    try:
        return structure.verify(fixture.model).ok
    except (RuntimeError, MemoryError):  # what makes no sense at all cannot be missed
        return False


def _stumbles(structure: sc.Structure) -> bool:
    """Return whether a rule has raised an error, which freezes whatever the operation touches."""
    return any("does not know this form of it" in axis.reason for axis in structure.axes)


def _judge(structure: sc.Structure, fixture: Fixture) -> str:
    """Return the verdict on a structure that `verify` has let pass."""
    cuts = [random_cut(structure, Random(seed), share, fewest=2) for seed, share in enumerate((1.0, 1.0, 0.5))]
    if not all(prove_cut(fixture.model, structure, kept).ok for kept in cuts):
        return "proof"
    if _costs_are_wrong(structure, fixture, cuts):
        return "cost"
    if all(_is_allowed(fixture.structure, make_plan(structure, kept)) for kept in cuts):
        return "frozen"
    return "freer" if all(_is_right(structure, fixture, kept) for kept in cuts) else "silent"


def _costs_are_wrong(structure: sc.Structure, fixture: Fixture, cuts: list[Kept]) -> bool:
    """Whether the structure counts other multiply-adds than run, or counts right only for the dense network."""
    sound = fixture.structure
    if structure.macs({}) != sound.macs({}):
        return True
    for kept in cuts:
        if _is_allowed(sound, make_plan(structure, kept)):
            small = cut_copy(fixture.model, make_plan(structure, kept))
            counts = {name: int(mask.sum()) for name, mask in kept.items()}
            if min(counts.values(), default=2) > 1 and structure.macs(counts) != sc.profile(small, fixture.inputs).macs:
                return True
    return False


def _is_allowed(sound: sc.Structure, plan: Plan) -> bool:
    """Whether the sound structure allows the same cut of every tensor and attribute."""
    kept: dict[str, torch.Tensor] = {}
    for axis in sound.prunable:
        mask = torch.ones(axis.size, dtype=torch.bool)
        for name, position in axis.members:
            index = plan.indices(name)[position] if name in plan.tensors else None
            if index is not None:
                units = unit_index(sound.tensors[name][position], axis.leaf)
                gone = torch.ones(units.numel(), dtype=torch.bool)
                gone[index] = False
                for unit in range(axis.size):
                    mask[unit] &= not bool(gone[units == unit].all())
        kept[axis.name] = mask
    if any(not bool(mask.any()) for mask in kept.values()):
        return False
    other = make_plan(sound, kept)
    names = plan.tensors.keys() | other.tensors.keys()
    same = all(_same_indices(plan, other, name) for name in names)
    return same and set(plan.attributes) == set(other.attributes)


def _same_indices(plan: Plan, other: Plan, name: str) -> bool:
    if name not in plan.tensors or name not in other.tensors:
        return False
    pairs = zip(plan.indices(name), other.indices(name), strict=True)
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _is_right(structure: sc.Structure, fixture: Fixture, kept: Kept) -> bool:
    """Whether the judge that knows nothing of axes finds a cut right."""
    if runs_a_statistic(structure, kept):
        return False
    plan = make_plan(structure, kept)
    return oracle_error(fixture.model, cut_copy(fixture.model, plan), plan, fixture.inputs) < 1e-10


class _Endless(BaseException):
    """A broken rule does not end; no ``except Exception`` may stop this."""


MEMORY = 8 << 30
"""A network that a broken rule has cut may ask for any amount; more than so many bytes is an error."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Let nothing take more memory than `MEMORY`."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _Endless

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
