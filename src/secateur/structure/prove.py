"""The proofs: of a cut, that it computes what the masked network does; of an analysis, by a trial cut among others."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InvalidInputs, PlanMismatch, SecateurError
from secateur.structure.dims import Dim, leaves, order_under
from secateur.structure.draws import FEWEST_DRAWS, IN_VAIN, draws, noting_use, to_use, why_unused
from secateur.structure.inputs import call_with_state, has_entries, modules_of, relative_error, state_of, undisturbed
from secateur.structure.masked import drops_branches, run_masked
from secateur.structure.plan import Plan
from secateur.structure.structure import Kept, Structure
from secateur.structure.surgery import apply_plan, make_plan, skeleton
from secateur.structure.trace import trace
from secateur.structure.verify import (
    NARROW,
    Outputs,
    Verification,
    permutations,
    permuted,
    proof_dtypes,
    random_cycle,
    redraw,
    told_apart,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

FEWEST = 2
"""So many units of each axis stay in a trial cut at least: a single one is special (a size of one is broadcast, and
code often takes another path for it), and what is true of it says little about the axis."""

ALL = torch.ones(1, dtype=torch.bool)
"""What a cut keeps of an axis that it does not name."""

FEWEST_IN_ORDER = 4
"""So many units of an axis must stay in a cut for it to say something about their order, too.

Two axes that the analysis takes for different ones, wrongly, do not show where by chance the same of their units stay,
in the same order: with eight units, of which four stay, one time in 420.
"""


def proved_keep(model: nn.Module, structure: Structure, kept: Kept, seed: int = 0) -> tuple[Verification, Structure]:
    """Return the proof of a cut; if it fails, also the structure with the axes frozen that are to blame."""
    cut = [name for name, mask in kept.items() if not bool(mask.all())]
    whole = {name: torch.ones_like(mask) for name, mask in kept.items()}

    def cut_of(names: list[str]) -> Kept:
        return {**whole, **{name: kept[name] for name in names}}

    wrong = "a cut could not be proved equal to the masked network"
    proof = _each_cut(model, structure, cut_of, _with_ties(structure, cut), wrong, seed)
    return proof, structure if proof.ok else structure.frozen(proof.failed)


def prove_cut(model: nn.Module, structure: Structure, kept: Kept, seed: int = 0) -> Verification:
    """Cut a weightless copy of `model` and compare it with the masked one on re-drawn parameters.

    Runs in float32, and once more in float64, because some networks amplify rounding. `model` is left as it was.
    """
    return _judged(_cut_errors(model, structure, kept, seed))


@dataclass(frozen=True)
class Errors:
    """What the comparison of a cut with the masked network has shown.

    Attributes:
        by_type: The error in each type that was tried, in that order; the last one decides.
        unused: Parameters of which the cut removes something, and which no draw has used.
    """

    by_type: Mapping[torch.dtype, float]
    unused: frozenset[str] = frozenset()


def _judged(errors: Errors) -> Verification:
    dtype, error = list(errors.by_type.items())[-1]
    reason = why_unused(errors.unused) if errors.unused else ""
    return Verification(error, ok=error <= TOLERANCE[dtype] and not reason, reason=reason)


def _cut_errors(
    model: nn.Module,
    structure: Structure,
    kept: Kept,
    seed: int,
    dtypes: Sequence[torch.dtype] = (),
    orders: Mapping[Dim, Tensor] | None = None,
) -> Errors:
    """Return the error in each type, up to the first that proves the cut or shows that the network does not run.

    With `orders`, the cut network has the units of these axes in another order than the masked one.
    """
    dtypes = dtypes or proof_dtypes(model)
    errors: dict[torch.dtype, float] = {}
    unused: frozenset[str] = frozenset()
    plan = make_plan(structure, kept)
    small = skeleton(model)
    try:
        apply_plan(small, plan)
    except PlanMismatch:
        return Errors({dtypes[0]: float("inf")})
    if not _recurrent_layers_fit(small):
        return Errors({dtypes[0]: float("inf")})
    pair = _Pair(model, small, structure, kept, plan, orders or {})
    for dtype in dtypes:
        errors[dtype], unused = pair.error(dtype, seed)
        if errors[dtype] <= TOLERANCE[dtype] or errors[dtype] == float("inf"):
            break
    return Errors(errors, unused)


@dataclass(frozen=True)
class _Pair:
    """A cut network beside the masked one."""

    model: nn.Module
    small: nn.Module
    structure: Structure
    kept: Kept
    plan: Plan
    orders: Mapping[Dim, Tensor]

    def error(self, dtype: torch.dtype, seed: int) -> tuple[float, frozenset[str]]:
        """Return by how much they differ, at most, on re-drawn parameters, and which that are cut no draw has used.

        Infinite if one of them does not run, or if no output has any entries. Where a branch is dropped, more draws are
        tried, because each may take another path.
        """
        cut = [axis.name for axis in self.structure.axes if not bool(self.kept.get(axis.name, ALL).all())]
        least = IN_VAIN if drops_branches(self.structure, self.kept) else FEWEST_DRAWS
        held = to_use(self.structure, [axis.name for axis in self.structure.axes])
        asked, left = (set[str]().union(*(held.get(name, ()) for name in names)) for names in (cut, held))
        errors = list[float]()
        for i, draw in enumerate(draws(self.structure, seed, left, least)):  # as patient with one axis as with all
            if i >= least and not left & asked:
                break
            try:
                error, used = self._error_on(dtype, draw, left)
            except SecateurError:
                return float("inf"), frozenset()
            if error is not None:
                errors.append(error)
                if error > TOLERANCE[dtype]:
                    return error, frozenset()
            left -= used
        return max(errors, default=float("inf")), frozenset(left & asked)

    def _error_on(self, dtype: torch.dtype, seed: int, names: Collection[str]) -> tuple[float | None, set[str]]:
        """Return the error on one draw, and which of the tensors with these names the masked network has used.

        There is no error where both outputs are empty.
        """
        with undisturbed(self.model):
            state = redraw(self.model, self.structure, dtype, seed)
        inputs = self.structure.inputs.to(dtype)
        with undisturbed(self.small):  # one after the other: where the model draws random numbers, both draw the same
            found = call_with_state(self.small, self._remaining(state), inputs)
        with noting_use(self.model, state, names, inputs) as used_for:
            expected = run_masked(self.model, self.structure, self.kept, state, inputs)
            used = used_for(expected)
        empty = not (has_entries(found) or has_entries(expected))
        return None if empty else relative_error(found, expected), used

    def _remaining(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the cut network, with buffers of its own: models write to them."""
        remaining = _sliced(state, self.structure, self.plan, self.orders)
        return {name: t if name in self.structure.parameters else t.clone() for name, t in remaining.items()}


def _recurrent_layers_fit(model: nn.Module) -> bool:
    """Return whether the weights of each LSTM, GRU and RNN have the sizes that it says.

    PyTorch does not look: it reads on in other memory, or ends the process.
    """
    return all(_has_its_sizes(module) for _, module in modules_of(model) if isinstance(module, nn.RNNBase))


def _has_its_sizes(layer: nn.RNNBase) -> bool:
    sizes = ("input_size", "hidden_size", "num_layers", "bias", "bidirectional", "proj_size")
    like = nn.RNNBase(layer.mode, **{name: getattr(layer, name) for name in sizes}, device="meta")
    found = {name: parameter.shape for name, parameter in layer.named_parameters(recurse=False)}
    return all(found[name] == parameter.shape for name, parameter in like.named_parameters() if name in found)


def _sliced(
    state: Mapping[str, Tensor], structure: Structure, plan: Plan, orders: Mapping[Dim, Tensor]
) -> dict[str, Tensor]:
    """Return the part of a state that remains, with the units of some axes in another order."""
    if not orders:
        return plan.slice_state(state)
    found = {name: tensor for name, tensor in state.items() if not plan.drops(name)}
    for name in found:  # axes that stay whole are reordered too, wherever they stand
        dims = structure.tensors[name]
        indices = plan.indices(name) if name in plan.tensors else [None] * len(dims)
        for position, (dim, kept) in enumerate(zip(dims, indices, strict=True)):
            index = kept
            if any(node in orders for node in leaves(dim)):
                order = order_under(dim, orders)
                index = order if kept is None else order[kept]
            if index is not None:
                found[name] = found[name].index_select(position, index.to(found[name].device))
    return found


def proved_structure(model: nn.Module, example_inputs: Any, seed: int = 0) -> Structure:
    """Return the structure of `model` with every axis frozen that cannot be proved."""
    return proved(model, trace(model, example_inputs), seed)


def proved(model: nn.Module, structure: Structure, seed: int = 0) -> Structure:
    """Return a structure of `model` with every axis frozen that cannot be proved."""
    return structure.frozen(verified(model, structure, seed).failed)


def verified(model: nn.Module, structure: Structure, seed: int = 0) -> Verification:
    """Return whether every prunable axis can be reordered and cut, and what is wrong with those that cannot.

    The analysis is verified by permutation, and then a trial cut of half of every axis is compared with the masked
    network: a size that the code uses in secret shows in a cut alone. First both are tried at once.

    Raises:
        InvalidInputs: The model is on the meta device.
    """
    if any(tensor.is_meta for tensor in state_of(model).values()):
        raise InvalidInputs(
            "A model on the meta device has no values to verify an analysis with. Pass one with values, or a small "
            "network of the same configuration: verify_by_twin(structure, twin, inputs)."
        )
    trial = half_of_each(structure, [axis.name for axis in structure.prunable], seed)
    proof = proved_with_the_analysis(model, structure, trial, seed)
    if proof is not None:
        return proof
    by_order = permuted(model, structure, seed)
    left = structure.frozen(by_order.failed)
    by_cut = _each_cut(
        model,
        left,
        lambda names: half_of_each(left, names, seed),
        _with_ties(left, [axis.name for axis in left.prunable]),
        "a trial cut could not be proved equal to the masked network",
        seed,
    )
    return replace(
        by_order,
        max_error=max(by_order.max_error, by_cut.max_error),
        ok=by_order.ok and by_cut.ok,
        failed={**by_order.failed, **by_cut.failed},
    )


def proved_with_the_analysis(model: nn.Module, structure: Structure, kept: Kept, seed: int = 0) -> Verification | None:
    """Return the proof that a cut computes what the masked network does even when its units come in another order.

    That proves the analysis of all axes of `kept` as well, in less time than one proof after the other. Where few units
    are left, the order of an axis says little, and some are permuted beside others, too. None says that it has to be
    done one after the other: because something failed, or because the path depends on values, and two proofs take more
    paths than one.
    """
    if structure.reads_values:
        return None
    few = [
        name for name, mask in kept.items() if structure.axis(name).size < NARROW or int(mask.sum()) < FEWEST_IN_ORDER
    ]
    groups = told_apart(few)
    ordered = set(kept).difference(few)
    if groups and all(int(kept[name].sum()) > 1 for name in groups[0]):
        ordered |= set(groups.pop(0))
    generator = torch.Generator().manual_seed(seed)
    orders = {structure.axis(name).leaf: _reordered(kept[name], generator) for name in kept if name in ordered}
    proofs = [_judged(_cut_errors(model, structure, kept, seed, orders=orders))]
    if proofs[0].ok:
        proofs += permutations(Outputs(model, structure, seed), groups)
    if not all(proof.ok for proof in proofs):
        return None
    return replace(proofs[0], max_error=max(proof.max_error for proof in proofs))


def _reordered(kept: Tensor, generator: torch.Generator) -> Tensor:
    """Return an order in which every kept unit takes the place of another one."""
    order, places = torch.arange(kept.numel()), kept.nonzero().flatten()
    order[places] = places[random_cycle(places.numel(), generator)]
    return order


def proved_depth(model: nn.Module, example_inputs: Any, seed: int = 0) -> Structure:
    """Return the structure of `model` with every residual branch frozen that cannot be dropped with proof."""
    structure = trace(model, example_inputs)
    dropped = _each_cut(
        model,
        structure,
        lambda names: {name: torch.zeros(1, dtype=torch.bool) for name in names},
        [(branch.name,) for branch in structure.branches if branch.prunable],
        "dropping it could not be proved equal to the masked network",
        seed,
    )
    return structure.frozen(dropped.failed)


def _each_cut(
    model: nn.Module,
    structure: Structure,
    cut_of: Callable[[list[str]], Kept],
    classes: list[tuple[str, ...]],
    wrong: str,
    seed: int,
) -> Verification:
    """Prove a cut of all axes (or branches) at once; if it fails, find those to blame, and say what is wrong."""
    names = [name for members in classes for name in members]
    if not names:
        return Verification(0.0, ok=True)
    errors = _cut_errors(model, structure, cut_of(names), seed)
    proof = _judged(errors)
    if proof.ok:
        return proof
    if errors.unused:
        unused = {name: held & errors.unused for name, held in to_use(structure, names).items()}
        nothing = proof.max_error == float("inf")  # no output had entries
        blamed = [members for members in classes if nothing or any(unused.get(name) for name in members)]
        failed = {name: why_unused(unused.get(name) or errors.unused) for members in blamed for name in members}
        return replace(proof, failed=failed, reason="")  # of all others the cut is right, and has been used
    culprits = _Search(model, structure, cut_of, seed, errors).culprits(classes) or names
    left = [members for members in classes if not set(members) & set(culprits)]
    rest = _each_cut(model, structure, cut_of, left, wrong, seed)  # some may fail only together
    return replace(proof, failed={**dict.fromkeys(culprits, wrong), **rest.failed})


def _with_ties(structure: Structure, names: list[str]) -> list[tuple[str, ...]]:
    """Return the axes that must be cut together, as one tuple each."""
    tied = {name for tie in structure.ties for name in tie}
    ties = [tie for tie in structure.ties if set(tie) & set(names)]
    return [*ties, *((name,) for name in names if name not in tied)]


class _Search:
    """Finds out which classes of a cut that failed are to blame, by cutting halves of them.

    Where float32 and float64 have found the same error of the whole cut, rounding plays no part in it, and float32
    alone judges groups: a matter of speed, for what is frozen in the end has failed in both. Models with scales are
    drawn differently for the two (`redraw`), so that the errors differ and both judge.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, cut_of: Callable[[list[str]], Kept], seed: int, errors: Errors
    ) -> None:
        self.model, self.structure, self.cut_of, self.seed = model, structure, cut_of, seed
        found = errors.by_type.values()
        agree = len(found) == 2 and min(found) > 0.9 * max(found)
        self.quick = (torch.float32,) if agree else ()

    def culprits(self, classes: list[tuple[str, ...]]) -> list[str]:
        """Return the names in those of `classes` that fail; together they are known to fail."""
        return self._culprits(sorted(classes, key=_kind))  # layers repeat, and so do their culprits: side by side

    def _culprits(self, classes: list[tuple[str, ...]]) -> list[str]:
        names = [name for members in classes for name in members]
        if len(classes) == 1:
            return names
        middle = len(classes) // 2
        found = []
        for half in (classes[:middle], classes[middle:]):
            if self._fails([name for members in half for name in members], () if len(half) == 1 else self.quick):
                found += self._culprits(half)
        return found or (names if self._fails(names, ()) else [])  # only together: none of them can be trusted

    def _fails(self, names: list[str], dtypes: Sequence[torch.dtype]) -> bool:
        return not _judged(_cut_errors(self.model, self.structure, self.cut_of(names), self.seed, dtypes)).ok


def _kind(members: tuple[str, ...]) -> str:
    """Return the name of a class without the numbers of its layer."""
    return re.sub(r"\d+", "", members[0])


def half_of_each(structure: Structure, names: list[str], seed: int) -> dict[str, torch.Tensor]:
    """Return about half of the units of each axis, at random, but no less than `FEWEST`, and as many as it must keep.

    An odd number where possible: it shows what takes no other sizes than multiples of two or eight.
    """
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name in names:
        size, step = structure.axis(name).size, structure.steps.get(name, 1)
        kept[name] = torch.zeros(size, dtype=torch.bool)
        most = size // step
        events = max(most // 2, min(FEWEST, most), -(-structure.least.get(name, 1) // step))
        events += events % 2 == 0 and events + 1 < most
        kept[name][torch.randperm(size, generator=generator)[: step * events]] = True
    return kept
