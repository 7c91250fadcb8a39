"""The structure of a model: its axes, and what follows from cutting them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from torch import Tensor, nn

from secateur.structure.depth import Branch
from secateur.structure.dims import Dim, shrunk, size_under
from secateur.structure.inputs import Inputs
from secateur.structure.provenance import Attribute
from secateur.structure.roles import Role
from secateur.structure.tracer import Site
from secateur.structure.verify import Verification


@dataclass(frozen=True)
class Axis:
    """Slices of tensors that live and die together, one unit per index.

    Attributes:
        name: The module (or tensor) that produces the axis.
        size: Number of units.
        members: Every (tensor name, dim) that holds the axis, possibly as one factor or segment of that dim.
        prunable: Whether units may be removed.
        reason: Why not, if not.
        role: What its units are (a key of `ROLES`), as far as their use says so; else empty.
    """

    name: str
    size: int
    members: tuple[tuple[str, int], ...]
    prunable: bool
    reason: str
    role: Role
    leaf: Dim = field(repr=False, compare=False)


Kept = Mapping[str, Tensor]
"""Which units of each axis are kept: bool tensors of shape (size,); an axis that is not named is kept whole.

A residual branch is named like an axis of size 1.
"""


@dataclass(frozen=True)
class Structure:
    """The result of `trace`: an immutable description of a model; it holds no weights.

    Attributes:
        axes: All axes that parameters have, frozen ones included.
        ties: Names of axes that lose units together.
        steps: How many units such an axis loses at a time, if not one.
        least: How many units an axis must keep, if more than one: so many are chosen for each row.
        tensors: The dims of every parameter and buffer.
        attributes: Integer attributes that are the size of a dim.
        path: The operations of the traced run that are of a kind that consumes units, and what each consumes, in order.
        reads_values: Whether the code looked at values that follow from parameters: others may take other paths.
        consumers: For parameters that are contracted, the dims that are summed over.
        multiply_adds: One tuple of dims per contraction; its cost is the product of their sizes.
        parameters: Names of the parameters; the other tensors are buffers.
        outputs: The dims of what each module returns that runs once: of the tensor, or of the one that a tuple begins
            with.
        blocks: The modules, of those, in which residual branches are added to their stream, in order.
        branches: The residual branches.
        order: Parameters and buffers that a run used, in the order of their first use.
        only_in_training: Those of them that only a run in training mode used.
        inputs: The example inputs.
    """

    axes: tuple[Axis, ...]
    ties: tuple[tuple[str, ...], ...]
    steps: Mapping[str, int]
    least: Mapping[str, int]
    tensors: Mapping[str, tuple[Dim, ...]]
    attributes: Mapping[Attribute, Dim]
    path: tuple[tuple[str, tuple[Site, ...]], ...]
    reads_values: bool
    consumers: Mapping[str, tuple[Dim, ...]]
    multiply_adds: tuple[tuple[Dim, ...], ...]
    parameters: frozenset[str]
    outputs: Mapping[str, tuple[Dim, ...]]
    blocks: tuple[str, ...]
    branches: tuple[Branch, ...]
    order: tuple[str, ...]
    only_in_training: frozenset[str]
    inputs: Inputs = field(repr=False)

    def axis(self, name: str) -> Axis:
        """Return the axis with this name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Axis]:
        return {axis.name: axis for axis in self.axes}

    @property
    def prunable(self) -> tuple[Axis, ...]:
        """The axes whose units may be removed."""
        return tuple(axis for axis in self.axes if axis.prunable)

    # ----------------------------------------------------------------------------------- what a cut would cost

    def sizes(self, counts: Mapping[str, int]) -> dict[Dim, int]:
        """Return leaf sizes for a number of kept units per axis."""
        return {axis.leaf: counts[axis.name] for axis in self.axes if axis.name in counts}

    def macs(self, counts: Mapping[str, int]) -> int:
        """Return the multiply-adds of the traced call if each axis kept so many units."""
        sizes = self.sizes(counts)
        return sum(prod(size_under(dim, sizes) for dim in dims) for dims in self.multiply_adds)

    def params(self, counts: Mapping[str, int]) -> int:
        """Return the number of parameters if each axis kept so many units."""
        sizes = self.sizes(counts)
        return sum(prod(size_under(d, sizes) for d in self.tensors[name]) for name in self.parameters)

    def cut(self, kept: Kept) -> Structure:
        """Return the structure of the model when only the `kept` units remain; axes keep their names."""
        sizes = self.sizes({name: int(mask.sum()) for name, mask in kept.items()})
        done: dict[Dim, Dim] = {}

        def small(dims: Iterable[Dim]) -> tuple[Dim, ...]:
            return tuple(shrunk(dim, sizes, done) for dim in dims)

        def small_site(site: Site) -> Site:
            return replace(site, dim=shrunk(site.dim, sizes, done))

        tensors = {name: small(dims) for name, dims in self.tensors.items()}
        leaf_of = {axis.name: shrunk(axis.leaf, sizes, done) for axis in self.axes}
        return replace(
            self,
            axes=tuple(replace(a, size=leaf_of[a.name].size, leaf=leaf_of[a.name]) for a in self.axes),
            tensors=tensors,
            outputs={name: small(dims) for name, dims in self.outputs.items()},
            attributes={attribute: shrunk(dim, sizes, done) for attribute, dim in self.attributes.items()},
            path=tuple((name, tuple(map(small_site, sites))) for name, sites in self.path),
            consumers={name: small(dims) for name, dims in self.consumers.items()},
            multiply_adds=tuple(map(small, self.multiply_adds)),
            branches=tuple(replace(branch, leaf=shrunk(branch.leaf, sizes, done)) for branch in self.branches),
        )

    # ----------------------------------------------------------------------------------------- masks and slices

    def masks(self, kept: Kept) -> dict[Dim, Tensor]:
        """Return leaf masks for the kept units, those of branches included."""
        leaves = {axis.name: axis.leaf for axis in self.axes} | {branch.name: branch.leaf for branch in self.branches}
        return {leaves[name]: mask for name, mask in kept.items()}

    # ------------------------------------------------------------------------------------------------- proof

    @property
    def reasons(self) -> dict[str, str]:
        """Why each frozen axis and branch is frozen, by name."""
        found = {axis.name: axis.reason for axis in self.axes if not axis.prunable}
        return found | {branch.name: branch.reason for branch in self.branches if not branch.prunable}

    def verify(self, model: nn.Module, seed: int = 0) -> Verification:
        """Return whether every prunable axis of `model` can be reordered and cut.

        Axes are permuted, many at once, on random parameters, which must leave the output unchanged; and half of the
        units of each are cut, which must compute what the masked network does. `model` is left as it was.

        Args:
            model: The network that was traced, or one with the same structure.
            seed: Controls the random parameters, orders and cuts.

        Returns:
            The largest relative error; if it is not rounding, which axes fail and why.

        Raises:
            InvalidInputs: The model is on the meta device.
        """
        from secateur.structure.prove import verified  # needs this class

        return verified(model, self, seed)

    def frozen(self, reasons: Mapping[str, str]) -> Structure:
        """Return the same structure with more axes or branches frozen: name -> reason. Axes tied to them freeze too."""
        why = dict(reasons)
        for tie in self.ties:
            first = next((name for name in tie if name in reasons), None)
            if first is not None:
                why.update({name: f"must stay as long as {first}, which is frozen" for name in tie if name not in why})
        axes = tuple(replace(a, prunable=False, reason=why[a.name]) if a.name in why else a for a in self.axes)
        branches = tuple(replace(b, prunable=False, reason=why[b.name]) if b.name in why else b for b in self.branches)
        ties = tuple(tie for tie in self.ties if not why.keys() & set(tie))
        return replace(self, axes=axes, branches=branches, ties=ties)
