"""Units that are removed physically, with a proof for every cut."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur.core.units import Kept, Limits, Units
from secateur.structure.carry import ALONE, cut_in_place
from secateur.structure.inputs import Inputs, state_of
from secateur.structure.plan import Plan
from secateur.structure.promises import read_promises
from secateur.structure.prove import proved_keep
from secateur.structure.settings import read_settings
from secateur.structure.structure import Structure
from secateur.structure.surgery import make_plan
from secateur.structure.verify import Verification


class CutUnits(Units):
    """Units of which a network is made smaller.

    Attributes:
        structure: The structure of `model` as it is now.
        dense_structure: The structure before the first cut.
        proofs: One verification per cut.
        companions: What follows the model through its cuts.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, structure: Structure, limits: Limits) -> None:
        self.model = model
        self.inputs = inputs
        self.dense_structure = self.structure = structure
        self.limits = limits
        self.proofs: list[Verification] = []
        self.companions = ALONE
        self._remembered = [r for r in (read_settings(model), read_promises(model, inputs)) if r is not None]
        self._kept = {name: mask.clone() for name, mask in self.whole().items()}

    def whole(self) -> Kept:
        """Return a selection that keeps everything, by axis or branch."""
        return self.by_name({group: torch.ones(shape, dtype=torch.bool) for group, shape in self.shapes.items()})

    @abstractmethod
    def by_name(self, kept: Kept) -> Kept:
        """Return a selection by group as one by axis or branch of the present structure."""

    @abstractmethod
    def kept_in(self, plan: Plan) -> Kept:
        """Return the selection by group that a plan for the unpruned model stands for."""

    @abstractmethod
    def structure_after(self, structure: Structure, kept: Kept) -> Structure:
        """Return what the structure has become with a cut, which `model` has undergone."""

    @property
    def plan(self) -> Plan:
        """What remains of the unpruned model."""
        return make_plan(self.dense_structure, self._kept)

    def finish(self, small: nn.Module) -> Plan:
        """Return what remains, after letting what the final network says about itself follow; mutates `small`."""
        plan = self.plan
        for remembered in self._remembered if plan != Plan() else ():
            plan = remembered.state(small, self.dense_structure, plan)
        return plan

    def plan_of(self, kept: Kept) -> Plan:
        """Return the plan of a cut of the present model."""
        return make_plan(self.structure, self.by_name(kept))

    def keep(self, kept: Kept) -> bool:
        """Cut everything else off in place, and prove that the result computes what the masked network computes.

        Returns:
            Whether that is so. If not, nothing is cut, and the groups that are to blame are frozen.
        """
        named = self.by_name(kept)
        proof, structure = self.prove(named)
        if not proof.ok:
            self.freeze(structure)
            return False
        self.proofs.append(proof)
        for name, mask in named.items():
            self._kept[name][self._kept[name].clone()] = mask.cpu()
        cut_in_place(self.model, make_plan(structure, named), self.companions)
        self.structure = self.structure_after(structure, named)
        return True

    def prove(self, kept: Kept) -> tuple[Verification, Structure]:
        """Return the proof of a cut; if it fails, also the structure with everything frozen that is to blame."""
        return proved_keep(self.model, self.structure, kept)

    def freeze(self, structure: Structure) -> None:
        """Take over what a failed proof has frozen."""
        self.structure = structure
        self.dense_structure = self.dense_structure.frozen(structure.reasons)
        self.limits = replace(self.limits, ties=structure.ties)

    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Load the remaining part of a state dict of the unpruned model."""
        first_name = {id(tensor): name for name, tensor in state_of(self.model).items()}
        own: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        own |= dict(self.model.named_buffers(remove_duplicate=False))
        plan = self.plan
        self.model.load_state_dict(
            {
                name: plan.slice(first_name[id(own[name])], tensor) if name in own else tensor
                for name, tensor in state.items()
                if not plan.drops(name)
            }
        )
