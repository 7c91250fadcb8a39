"""The proof of a cut: the smaller network must compute what the masked network computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.structure.inputs import call_with_state, relative_error, undisturbed
from secateur.structure.masked import run_masked
from secateur.structure.structure import Kept, Structure
from secateur.structure.surgery import apply_plan, make_plan, skeleton
from secateur.structure.trace import trace
from secateur.structure.verify import Verification, redraw

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BEYOND_ROUNDING = 1e-2
"""An error in float32 that rounding cannot explain, so that float64 need not be asked."""


def prove_cut(model: nn.Module, structure: Structure, kept: Kept, seed: int = 0) -> Verification:
    """Cut a weightless copy of `model` and compare it with the masked one on re-drawn parameters.

    Runs in float32, and once more in float64 if rounding could explain the difference. `model` is left as it was.
    """
    plan = make_plan(structure, kept)
    small = skeleton(model)
    apply_plan(small, plan)
    error = float("inf")
    for dtype, tolerance in TOLERANCE.items():
        with undisturbed(model), undisturbed(small):
            state = redraw(model, structure, dtype, seed)
            inputs = structure.inputs.to(dtype)
            try:
                found = call_with_state(small, plan.slice_state(state), inputs)
                expected = run_masked(model, structure, kept, state, inputs)
            except SecateurError:
                return Verification(float("inf"), ok=False)
        error = relative_error(found, expected)
        if error <= tolerance:
            return Verification(error, ok=True)
        if error > BEYOND_ROUNDING:
            break
    return Verification(error, ok=False)


def proved_structure(model: nn.Module, example_inputs: Any, seed: int = 0) -> Structure:
    """Return the structure of `model` with every axis frozen that cannot be proved.

    The analysis is verified by permutation, and then a trial cut of half of every axis is compared with the masked
    network. Axes that fail either proof are frozen, with that reason.
    """
    structure = trace(model, example_inputs)
    verification = structure.verify(model, seed)
    structure = structure.frozen(dict.fromkeys(verification.failed, "permuting it changed the output"))
    names = [axis.name for axis in structure.prunable]
    failed = _unprovable(model, structure, _with_ties(structure, names), seed)
    return structure.frozen(dict.fromkeys(failed, "a trial cut could not be proved equal to the masked network"))


def _with_ties(structure: Structure, names: list[str]) -> list[tuple[str, ...]]:
    """Return the axes that must be cut together, as one tuple each."""
    tied = {name for tie in structure.ties for name in tie}
    return [*structure.ties, *((name,) for name in names if name not in tied)]


def _unprovable(model: nn.Module, structure: Structure, classes: list[tuple[str, ...]], seed: int) -> list[str]:
    """Return the axes whose cut fails: all at once first, then halves until each culprit stands alone."""
    if not classes or prove_cut(model, structure, _half(structure, classes, seed), seed).ok:
        return []
    if len(classes) == 1:
        return list(classes[0])
    middle = len(classes) // 2
    left = _unprovable(model, structure, classes[:middle], seed)
    right = _unprovable(model, structure, classes[middle:], seed)
    return left + right or [name for names in classes for name in names]


def _half(structure: Structure, classes: list[tuple[str, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Return a random half of the units of each axis, at least one."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name in (name for names in classes for name in names):
        size = structure.axis(name).size
        kept[name] = torch.zeros(size, dtype=torch.bool)
        kept[name][torch.randperm(size, generator=generator)[: max(1, size // 2)]] = True
    return kept
