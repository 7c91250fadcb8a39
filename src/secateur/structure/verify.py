"""The proof of an analysis by permutation: one half of `Structure.verify`, beside the trial cut of `prove`.

If an axis is right, then reordering its units by the same random permutation in every member tensor leaves the output
unchanged. Where all axes are wide, one forward pass with all of them permuted at once checks the whole analysis. It
runs on re-drawn parameters, because freshly initialized ones (zero scales, equal running statistics) hide errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import InvalidInputs
from secateur.structure.dims import Dim, leaves, order_under
from secateur.structure.draws import FEWEST_DRAWS, draws, noting_use, to_use, why_unused
from secateur.structure.inputs import call_with_state, has_entries, relative_error, state_of, undisturbed

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
        ok: Whether that is at the level of rounding, and nothing has failed.
        failed: The axes that could not be proved, each with what is wrong with it.
        reason: Why nothing could be proved, where it is not said of an axis.
    """

    max_error: float
    ok: bool
    failed: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""


def proof_dtypes(model: nn.Module) -> tuple[torch.dtype, ...]:
    """Return the types that a proof tries: float64 where rounding could explain a difference, float32 before if it can.

    A float64 model is not tried in float32, where PyTorch may take other operations (recurrent layers do).
    """
    wide = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return (torch.float64,) if wide else (torch.float32, torch.float64)


def redraw(model: nn.Module, structure: Structure, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Return a generic state: random parameters of moderate size, random statistics, positive where they were.

    In float32 scales spread widely around 1: no mistake is too small to be seen, and deep networks do not overflow.
    They may amplify rounding just as well. In float64, which judges what float32 could not, scales are below 1:
    rounding fades, and the digits suffice for mistakes that fade too.

    Large parameters share memory, so a model that writes to one is not proved.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = state_of(model)
    pools = _Pools(dtype, generator, [t for name, t in tensors.items() if name in structure.parameters])
    state = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
        elif name in structure.parameters:
            # PyTorch picks the operations of a linear layer by this flag, even without gradients, and of a view's base.
            redrawn = pools.window(tensor) if _is_large(tensor) else _redraw_parameter(tensor, dtype, generator)
            state[name] = redrawn.detach().requires_grad_(tensor.requires_grad)
        else:
            state[name] = _redraw_buffer(tensor, dtype, generator)
    return state


def _is_large(tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.numel() > PERIOD


def _fan_in(tensor: Tensor) -> int:
    return tensor.numel() // max(tensor.shape[0], 1)


def _like(tensor: Tensor) -> Tensor:
    """Return a tensor without memory, in the layout that a copy would have: PyTorch picks operations by that, too."""
    return torch.empty_like(tensor, device="meta")


class _Pools:
    """Generic values for large parameters: windows on a few long vectors, because writing as many takes longer.

    There is one vector for each size of the values. It repeats itself after a prime number of entries, and windows
    begin at different, random places of the period, so that neither two slices of a window nor two windows are alike.
    """

    ALIGNED = 16
    """Windows begin at multiples of so many entries: some operations take a slower path elsewhere."""

    def __init__(self, dtype: torch.dtype, generator: torch.Generator, tensors: Iterable[Tensor]) -> None:
        lengths: dict[tuple[int, torch.device], int] = {}
        for tensor in filter(_is_large, tensors):
            key = _fan_in(tensor), tensor.device
            lengths[key] = max(lengths.get(key, 0), PERIOD + tensor.numel())
        self._begins = cycle(torch.randperm(PERIOD // self.ALIGNED, generator=generator).tolist() if lengths else [])
        noise = torch.randn(PERIOD, generator=generator) if lengths else torch.empty(0)
        self._vectors = {key: _repeated(noise * key[0] ** -0.5, n).to(key[1], dtype) for key, n in lengths.items()}

    def window(self, tensor: Tensor) -> Tensor:
        """Return values for a large parameter, in its layout."""
        like = _like(tensor)
        begin = self.ALIGNED * next(self._begins)
        return self._vectors[_fan_in(tensor), tensor.device].as_strided(like.shape, like.stride(), begin)


def _repeated(values: Tensor, length: int) -> Tensor:
    return values.repeat(-(-length // len(values)))[:length]


def _redraw_parameter(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return generic values of a size that suits a small parameter."""
    like = _like(tensor)
    noise = torch.randn(tensor.numel(), generator=generator)
    if tensor.dim() >= 2:
        noise *= max(_fan_in(tensor), 1) ** -0.5
    elif not bool((tensor > 0).all()):
        noise = 1 + noise / 2
    elif dtype == torch.float64:
        noise = 1 / (1 + noise.abs() / 2)
    else:
        noise = torch.exp(noise / 2 - 0.1)
    return noise.to(tensor.device, dtype).as_strided(like.shape, like.stride())


def _redraw_buffer(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Vectors are statistics; larger buffers are tables and masks, whose values mean something."""
    if tensor.dim() != 1 or tensor.numel() < 2 or not bool(tensor.isfinite().all()):
        return tensor.to(dtype, copy=True)
    if bool((tensor >= 0).all()):
        values = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    else:
        values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return values.to(tensor.device, dtype)


NARROW = 8
"""Axes of fewer units than this may have the same order by chance."""


def permuted(model: nn.Module, structure: Structure, seed: int = 0) -> Verification:
    """Permute the prunable axes, many at once, and compare the outputs; on failure find out which are to blame.

    Wide axes are permuted all at once, narrow ones beside others that keep their order.
    """
    outputs = Outputs(model, structure, seed)
    worst, failed = 0.0, outputs.unreached()
    while True:
        left = [axis for axis in structure.prunable if axis.name not in failed]
        groups = told_apart([axis.name for axis in left if axis.size < NARROW]) or [[]]
        groups[0] += [axis.name for axis in left if axis.size >= NARROW]
        proofs = permutations(outputs, groups)
        worst = max(worst, *(proof.max_error for proof in proofs))
        reason = next((proof.reason for proof in proofs if proof.reason), "")
        if reason:
            return Verification(worst, False, {axis.name: reason for axis in structure.prunable}, reason)
        found = {name: wrong for proof in proofs for name, wrong in proof.failed.items()}
        failed |= found
        if not found:
            return Verification(worst, ok=not failed, failed=failed)


def permutations(outputs: Outputs, groups: Iterable[Sequence[str]]) -> list[Verification]:
    """Permute the axes of each group, one group after the other; on failure find out which are to blame.

    Runs in float32, and once more in float64 if rounding could explain the difference.
    """
    return [_decide(names, proof_dtypes(outputs.model), outputs.error_with) for names in groups]


NUMBERS = 15
"""So many narrow axes in a row are told apart, in four groups: the time must not grow faster than the network."""


def told_apart(narrow: Sequence[str]) -> list[list[str]]:
    """Return a few groups of narrow axes, such that one of any two neighbours is in one without the other.

    Two axes that the analysis takes for different ones, wrongly, show only if they have different orders; and those of
    two units have one order alone. Each axis has a number, and each group those with a certain bit in it. Such a pair
    stands in neighbouring layers.
    """
    numbers = {name: 1 + i % NUMBERS for i, name in enumerate(narrow)}
    bits = range(max(numbers.values(), default=0).bit_length())
    return [[name for name, number in numbers.items() if number >> bit & 1] for bit in bits]


class Outputs:
    """What a model computes on re-drawn parameters, as they are and with axes permuted."""

    def __init__(self, model: nn.Module, structure: Structure, seed: int = 0) -> None:
        self.model, self.structure, self.seed = model, structure, seed
        self._held = to_use(structure, [axis.name for axis in structure.prunable])
        self._to_use = frozenset[str]().union(*self._held.values())
        self._used: dict[tuple[torch.dtype, int], set[str]] = {}
        self._kept: dict[tuple[torch.dtype, int], Any] = {}
        self._least = FEWEST_DRAWS

    def unreached(self) -> dict[str, str]:
        """Return the axes with parameters that no draw uses, each with what is wrong."""
        left, dtype = set(self._to_use), proof_dtypes(self.model)[0]
        for i, draw in enumerate(draws(self.structure, self.seed, left, 0)):
            self._least = max(FEWEST_DRAWS, i + 1)  # each group of axes is used by some of these
            with suppress(InvalidInputs):
                left -= self._unpermuted(dtype, draw)[1]
        return {name: why_unused(held & left) for name, held in self._held.items() if held & left}

    def error_with(self, names: Sequence[str], dtype: torch.dtype) -> float:
        """Return the relative error of the output when these axes are permuted in every tensor that holds them.

        Infinite if the model does not run, if its output has no entries, or if the draws leave some of these axes
        unused.
        """
        generator = torch.Generator().manual_seed(self.seed)
        sizes = {name: self.structure.axis(name).size for name in names}
        orders = {self.structure.axis(n).leaf: random_cycle(size, generator) for n, size in sizes.items()}
        errors, left = list[float](), set[str]().union(*(self._held.get(name, ()) for name in names))
        try:
            for i, draw in enumerate(draws(self.structure, self.seed, left, self._least)):
                if i >= FEWEST_DRAWS and not left & self._used.get((dtype, draw), left):
                    continue
                expected, used = self._unpermuted(dtype, draw)
                if has_entries(expected) and (i < FEWEST_DRAWS or left & used):
                    errors.append(relative_error(self._output(orders, dtype, draw)[0], expected))
                left -= used
        except InvalidInputs:  # code that insists on one dtype
            return float("inf")
        return float("inf") if left else max(errors, default=float("inf"))

    def _unpermuted(self, dtype: torch.dtype, draw: int) -> tuple[Any, set[str]]:
        """Return the output and which parameters that must be used have been; the first few are remembered."""
        if (dtype, draw) in self._kept:
            return self._kept[dtype, draw], self._used[dtype, draw]
        output, self._used[dtype, draw] = self._output({}, dtype, draw)
        if len(self._kept) < 2 * FEWEST_DRAWS:
            self._kept[dtype, draw] = output
        return output, self._used[dtype, draw]

    def _output(self, orders: Mapping[Dim, Tensor], dtype: torch.dtype, draw: int) -> tuple[Any, set[str]]:
        """Return the output of the model and, if nothing is permuted, which parameters that must be used have been."""
        with undisturbed(self.model):  # drawn anew each time: some models write to their state, or cache what follows
            state = _permute(redraw(self.model, self.structure, dtype, draw), self.structure, orders)
            inputs = self.structure.inputs.to(dtype)
            with noting_use(self.model, state, () if orders else self._to_use, inputs) as used_for:
                output = call_with_state(self.model, state, inputs)
                return output, used_for(output)


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
        reason = "with re-drawn parameters the model's output is random, not finite, empty, or not to be had in float64"
        return Verification(worst, ok=False, failed=dict.fromkeys(names, reason), reason=reason)
    culprits = _culprits(names, tolerance, error)
    return Verification(worst, ok=False, failed=dict.fromkeys(culprits, "permuting it changed the output"))


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
