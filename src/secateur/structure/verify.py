"""The proof of an analysis, by permutation.

If an axis is right, then reordering its units by the same random permutation in every member tensor leaves the output
unchanged. One forward pass with all axes permuted at once checks the whole analysis. It runs on re-drawn parameters,
because freshly initialized ones (zero scales, equal running statistics) hide errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.errors import InvalidInputs
from secateur.structure.dims import Dim, leaves, order_under
from secateur.structure.inputs import call_with_state, relative_error, state_of, undisturbed

if TYPE_CHECKING:
    from secateur.structure.structure import Structure

PERIOD = 131_071
"""After so many entries a re-drawn tensor repeats itself. A prime, so that no two slices along a dim are alike: drawing
a new number for each weight of a large model takes longer than running it."""

PERMUTATION_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@dataclass(frozen=True)
class Verification:
    """The result of a proof.

    Attributes:
        max_error: Largest difference of the outputs, relative to the largest output.
        ok: Whether that is at the level of rounding.
        failed: The axes for which it is not.
        reason: Why nothing could be proved, if that does not lie at an axis.
    """

    max_error: float
    ok: bool
    failed: tuple[str, ...] = ()
    reason: str = ""


def proof_dtypes(model: nn.Module) -> tuple[torch.dtype, ...]:
    """Return the types that a proof tries: float64 where rounding could explain a difference, float32 before if it can.

    A float64 model is not tried in float32, where PyTorch may take other operations (recurrent layers do).
    """
    wide = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return (torch.float64,) if wide else (torch.float32, torch.float64)


def redraw(model: nn.Module, structure: Structure, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Return a generic state: random parameters of moderate size, random statistics, positive where they were.

    In float32 scales are above 1, so that signals grow and no mistake is too small to be seen. Deep networks then
    amplify rounding just as well. In float64, which judges what float32 could not, scales are below 1: rounding fades,
    and the digits suffice for mistakes that fade too.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in state_of(model).items():
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
        elif name in structure.parameters:
            # PyTorch picks the operations of a linear layer by this flag, even without gradients.
            # So it does by their memory layout.
            redrawn = _redraw_parameter(tensor, torch.empty_like(tensor, dtype=dtype), generator)
            state[name] = redrawn.requires_grad_(tensor.requires_grad)
        else:
            state[name] = _redraw_buffer(tensor, dtype, generator)
    return state


def _redraw_parameter(tensor: Tensor, result: Tensor, generator: torch.Generator) -> Tensor:
    """Fill `result` with generic values of a size that suits `tensor`."""
    noise = torch.randn(min(tensor.numel(), PERIOD), generator=generator)
    if tensor.dim() >= 2:
        noise.mul_(float(tensor.shape[0] / max(tensor.numel(), 1)) ** 0.5)
    else:
        positive = bool((tensor > 0).all())
        noise = torch.add(1, noise.abs() if positive else noise, alpha=0.5)
        if positive and result.dtype == torch.float64:
            noise = 1 / noise
    in_memory_order = result.detach().as_strided((result.numel(),), (1,))
    for part in in_memory_order.split(PERIOD):
        part.copy_(noise[: part.numel()])
    return result


def _redraw_buffer(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Vectors are statistics; larger buffers are tables and masks, whose values mean something."""
    if tensor.dim() != 1 or tensor.numel() < 2 or not bool(tensor.isfinite().all()):
        return tensor.to(dtype, copy=True)
    if bool((tensor >= 0).all()):
        values = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    else:
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return values.to(tensor.device, dtype)


def verify_structure(model: nn.Module, structure: Structure, seed: int = 0) -> Verification:
    """Permute all prunable axes at once and compare the outputs; on failure find out which axes are to blame.

    Runs in float32, and once more in float64 if rounding could explain the difference.

    Raises:
        InvalidInputs: The model is on the meta device.
    """
    if any(tensor.is_meta for tensor in state_of(model).values()):
        raise InvalidInputs(
            "A model on the meta device has no values to verify an analysis with. Pass one with values, or a small "
            "network of the same configuration: verify_by_twin(structure, twin, inputs)."
        )
    names = [axis.name for axis in structure.prunable]
    return _decide(
        names, proof_dtypes(model), lambda subset, dtype: _permutation_error(model, structure, subset, dtype, seed)
    )


def _permutation_error(
    model: nn.Module, structure: Structure, names: Sequence[str], dtype: torch.dtype, seed: int
) -> float:
    generator = torch.Generator().manual_seed(seed)
    orders = {structure.axis(n).leaf: random_cycle(structure.axis(n).size, generator) for n in names}
    inputs = structure.inputs.to(dtype)
    try:
        with undisturbed(model):
            expected = call_with_state(model, redraw(model, structure, dtype, seed), inputs)
        with undisturbed(model):  # anew, because some models write to their state or cache what they derive from it
            found = call_with_state(model, _permute(redraw(model, structure, dtype, seed), structure, orders), inputs)
    except InvalidInputs:  # code that insists on one dtype
        return float("inf")
    return relative_error(found, expected)


def random_cycle(size: int, generator: torch.Generator) -> Tensor:
    """Return a random order in which no unit keeps its place (a plain random order of two units often is none)."""
    round_trip = torch.randperm(size, generator=generator)
    order = torch.empty_like(round_trip)
    order[round_trip] = round_trip.roll(1)
    return order


def _permute(state: dict[str, Tensor], structure: Structure, orders: Mapping[Dim, Tensor]) -> dict[str, Tensor]:
    """Reorder each dim of each tensor; mutates and returns `state`, so that no two copies of it take memory."""
    for name in state:
        for position, dim in enumerate(structure.tensors[name]):
            if any(node in orders for node in leaves(dim)):
                order = order_under(dim, orders)
                state[name] = state[name].index_select(position, order.to(state[name].device))
    return state


def _decide(
    names: Sequence[str], dtypes: Sequence[torch.dtype], error: Callable[[Sequence[str], torch.dtype], float]
) -> Verification:
    """Try all axes in each type, then halves of them until each culprit stands alone."""
    worst = 0.0
    for dtype in dtypes:
        worst = error(names, dtype)
        if worst <= PERMUTATION_TOLERANCE[dtype]:
            return Verification(worst, ok=True)
    tolerance = PERMUTATION_TOLERANCE[torch.float64]
    if error([], torch.float64) > tolerance:
        reason = "with re-drawn parameters the model's output is random, not finite, or not to be had in float64"
        return Verification(worst, ok=False, failed=tuple(names), reason=reason)
    return Verification(worst, ok=False, failed=tuple(_culprits(names, tolerance, error)))


def _culprits(
    names: Sequence[str], tolerance: float, error: Callable[[Sequence[str], torch.dtype], float]
) -> list[str]:
    if not names or error(names, torch.float64) <= tolerance:
        return []
    if len(names) == 1:
        return list(names)
    half = len(names) // 2
    found = _culprits(names[:half], tolerance, error) + _culprits(names[half:], tolerance, error)
    return found or list(names)  # only together: none of them can be trusted
