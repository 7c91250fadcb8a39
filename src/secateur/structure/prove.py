"""The proof of a cut: the smaller network must compute what the masked network computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from secateur.errors import PlanMismatch, SecateurError
from secateur.structure.inputs import call_with_state, relative_error, undisturbed
from secateur.structure.masked import run_masked
from secateur.structure.structure import Kept, Structure
from secateur.structure.surgery import apply_plan, make_plan, skeleton
from secateur.structure.trace import trace
from secateur.structure.verify import Verification, proof_dtypes, redraw

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def proved_keep(model: nn.Module, structure: Structure, kept: Kept, seed: int = 0) -> tuple[Verification, Structure]:
    """Return the proof of a cut; if it fails, also the structure with the axes frozen that are to blame."""
    proof = prove_cut(model, structure, kept, seed)
    if proof.ok:
        return proof, structure
    cut = [name for name, mask in kept.items() if not bool(mask.all())]
    whole = {name: torch.ones_like(mask) for name, mask in kept.items()}

    def fails(names: list[str]) -> bool:
        return not prove_cut(model, structure, {**whole, **{name: kept[name] for name in names}}, seed).ok

    failed = _culprits(_with_ties(structure, cut), fails)
    return proof, structure.frozen(dict.fromkeys(failed, "a cut could not be proved equal to the masked network"))


def prove_cut(model: nn.Module, structure: Structure, kept: Kept, seed: int = 0) -> Verification:
    """Cut a weightless copy of `model` and compare it with the masked one on re-drawn parameters.

    Runs in float32, and once more in float64, because some networks amplify rounding. `model` is left as it was.
    """
    plan = make_plan(structure, kept)
    small = skeleton(model)
    try:
        apply_plan(small, plan)
    except PlanMismatch:
        return Verification(float("inf"), ok=False)
    error = float("inf")
    for dtype in proof_dtypes(model):
        with undisturbed(model), undisturbed(small):
            state = redraw(model, structure, dtype, seed)
            inputs = structure.inputs.to(dtype)
            try:
                found = call_with_state(small, plan.slice_state(state), inputs)
                expected = run_masked(model, structure, kept, state, inputs)
            except SecateurError:
                return Verification(float("inf"), ok=False)
        error = relative_error(found, expected)
        if error <= TOLERANCE[dtype]:
            return Verification(error, ok=True)
        if error == float("inf"):
            break
    return Verification(error, ok=False)


def proved_structure(model: nn.Module, example_inputs: Any, seed: int = 0) -> Structure:
    """Return the structure of `model` with every axis frozen that cannot be proved.

    The analysis is verified by permutation, and then a trial cut of half of every axis is compared with the masked
    network. Axes that fail either proof are frozen, with that reason.
    """
    structure = trace(model, example_inputs)
    verification = structure.verify(model, seed)
    reason = verification.reason or "permuting it changed the output"
    structure = structure.frozen(dict.fromkeys(verification.failed, reason))

    def fails(names: list[str]) -> bool:
        return not prove_cut(model, structure, half_of_each(structure, names, seed), seed).ok

    failed = _culprits(_with_ties(structure, [axis.name for axis in structure.prunable]), fails)
    return structure.frozen(dict.fromkeys(failed, "a trial cut could not be proved equal to the masked network"))


def proved_depth(model: nn.Module, example_inputs: Any, seed: int = 0) -> Structure:
    """Return the structure of `model` with every residual branch frozen that cannot be dropped with proof."""
    structure = trace(model, example_inputs)

    def fails(names: list[str]) -> bool:
        return not prove_cut(model, structure, {name: torch.zeros(1, dtype=torch.bool) for name in names}, seed).ok

    failed = _culprits([(branch.name,) for branch in structure.branches if branch.prunable], fails)
    return structure.frozen(dict.fromkeys(failed, "dropping it could not be proved equal to the masked network"))


def _with_ties(structure: Structure, names: list[str]) -> list[tuple[str, ...]]:
    """Return the axes that must be cut together, as one tuple each."""
    tied = {name for tie in structure.ties for name in tie}
    ties = [tie for tie in structure.ties if set(tie) & set(names)]
    return [*ties, *((name,) for name in names if name not in tied)]


def _culprits(classes: list[tuple[str, ...]], fails: Callable[[list[str]], bool]) -> list[str]:
    """Return the axes whose cut fails: all at once first, then halves until each culprit stands alone."""
    names = [name for members in classes for name in members]
    if not names or not fails(names):
        return []
    if len(classes) == 1:
        return names
    middle = len(classes) // 2
    return _culprits(classes[:middle], fails) + _culprits(classes[middle:], fails) or names


def half_of_each(structure: Structure, names: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Return a random half of the units of each axis, at least one."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name in names:
        size, step = structure.axis(name).size, structure.steps.get(name, 1)
        kept[name] = torch.zeros(size, dtype=torch.bool)
        kept[name][torch.randperm(size, generator=generator)[: step * max(1, size // step // 2)]] = True
    return kept
