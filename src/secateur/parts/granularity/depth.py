"""Residual branches as units: pruning drops whole ones, so that the network becomes shallower."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.slots import Granularity, Scope
from secateur.core.units import Kept, Limits, LinearCost, Scores
from secateur.parts.granularity.cut import CutUnits
from secateur.structure.depth import Branch
from secateur.structure.inputs import Inputs, as_inputs
from secateur.structure.plan import Plan
from secateur.structure.prove import proved_depth
from secateur.structure.structure import Structure
from secateur.structure.trace import trace


class Depth(Granularity):
    """Each residual branch is a unit: in a ResNet a block, in a transformer the attention or the MLP of a block.

    Branches of equal cost form a group, for example all attention branches.

    Attributes:
        minimum: Fewest branches that stay in each group.
    """

    name = "depth"
    minimum: int = Field(0, ge=0)

    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> DepthUnits:
        """Return the branches whose names are in scope."""
        return DepthUnits(model, as_inputs(example_inputs), scope, self.minimum)


class DepthUnits(CutUnits):
    """The residual branches of a model that can be dropped, grouped by cost."""

    def __init__(self, model: nn.Module, inputs: Inputs, scope: Scope, minimum: int) -> None:
        structure = proved_depth(model, inputs)
        outside = {b.name: "outside the scope" for b in structure.branches if b.prunable and not scope.admits(b.name)}
        self.structure = structure.frozen(outside)
        super().__init__(model, inputs, self.structure, Limits(minimum))

    @property
    def groups(self) -> Mapping[str, list[Branch]]:
        """The branches of each group in order, by the name of the first."""
        by_cost: dict[Any, list[Branch]] = defaultdict(list)
        for branch in self.structure.branches:
            if branch.prunable:
                shapes = (tuple(dim.size for dim in self.structure.tensors[name]) for name in branch.tensors)
                by_cost[branch.macs, tuple(sorted(shapes))].append(branch)
        return {branches[0].name: branches for branches in by_cost.values()}

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """One vector per group."""
        return {group: torch.Size([len(branches)]) for group, branches in self.groups.items()}

    def obstacles(self) -> list[str]:
        """Return why branches cannot be dropped."""
        reasons = sorted({branch.reason for branch in self.structure.branches if branch.reason})
        return reasons or ["it has no residual branch that modules of its own compute"]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters of all branches."""
        held = {name for branches in self.groups.values() for branch in branches for name in branch.tensors}
        return {name: parameter for name, parameter in self.model.named_parameters() if name in held}

    def sum(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Return sums over each branch's parameters; with `consumed` over those of its last layer.

        The branch is linear in the parameters of its last layer, so a gate in front of the branch would see exactly
        these.
        """
        return {
            group: torch.stack([_sum(values, branch.gate if consumed else branch.tensors) for branch in branches])
            for group, branches in self.groups.items()
        }

    def by_name(self, kept: Kept) -> Kept:
        """Return a selection by group as one by branch."""
        groups = self.groups
        return {branch.name: kept[g][i : i + 1].cpu() for g in kept for i, branch in enumerate(groups[g])}

    def remaining(self, values: Scores, kept: Kept) -> Scores:
        """Return the values of the branches that stay; a group is named after the first of them."""
        groups = self.groups
        left = {group: v for group, v in super().remaining(values, kept).items() if v.numel()}
        return {groups[group][int(kept[group].int().argmax())].name: v for group, v in left.items()}

    def kept_in(self, plan: Plan) -> Kept:
        """Return which branches a plan does not drop."""
        dropped = {drop.module for drop in plan.dropped}
        return {
            group: torch.tensor([dropped.isdisjoint(path for path, _ in branch.modules) for branch in branches])
            for group, branches in self.groups.items()
        }

    def structure_after(self, structure: Structure, kept: Kept) -> Structure:
        """Trace the shallower model anew; what was frozen stays so."""
        after = trace(self.model, self.inputs)
        known = {branch.name: branch.reason for branch in structure.branches}
        reasons = {branch.name: known.get(branch.name, "no branch before the first cut") for branch in after.branches}
        return after.frozen({name: reason for name, reason in reasons.items() if reason})

    def freeze(self, structure: Structure) -> None:
        """Freeze every group of which a branch cannot be dropped after all."""
        bad = {branch.name for branch in structure.branches if not branch.prunable}
        names = [b.name for branches in self.groups.values() if any(b.name in bad for b in branches) for b in branches]
        super().freeze(structure.frozen(dict.fromkeys(names, "dropping a branch like it could not be proved")))

    def cost(self, per_branch: Mapping[str, float], total: float) -> LinearCost:
        """Return a cost to which each branch adds its own amount: the same within a group."""
        per_unit = {group: per_branch[branches[0].name] for group, branches in self.groups.items()}
        return LinearCost(per_unit, total - sum(per_unit[g] * len(branches) for g, branches in self.groups.items()))

    def numel(self, branch: Branch) -> dict[str, int]:
        """Return the number of entries of each tensor of a branch."""
        return {name: prod(dim.size for dim in self.structure.tensors[name]) for name in branch.tensors}


def _sum(values: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    return torch.stack([values[name].sum() for name in names if name in values]).sum()
