"""Units that are set to zero and kept there: the network keeps its shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.slots import Scope
from secateur.core.units import Kept, Limits, Scores, Units
from secateur.structure.inputs import Inputs


class MaskedUnits(Units):
    """Parts of a model's tensors, all those of a group with as many entries.

    Attributes:
        masks: Which entries are kept, by tensor; empty before the first cut.
    """

    limits = Limits()
    one_must_stay = True

    def __init__(self, model: nn.Module, inputs: Inputs, scope: Scope, biases: bool) -> None:
        self.model = model
        self.inputs = inputs
        self.masks: Kept = {}
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if (parameter.dim() > 1 or biases) and scope.admits(name)
        }

    @abstractmethod
    def groups_of(self, name: str) -> tuple[str, ...]:
        """Return the groups whose units a tensor consists of."""

    @abstractmethod
    def size(self, group: str) -> int:
        """Return how many entries each unit of a group has."""

    @abstractmethod
    def entries(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return, for each entry of a tensor, the value of its unit; gradients pass through.

        Args:
            name: Of the tensor.
            values: One number per unit, by group.
        """

    @abstractmethod
    def kept_in(self, masks: Mapping[str, Tensor]) -> Kept:
        """Return the units of which masks keep an entry; masks of another model give other units."""

    def obstacles(self) -> list[str]:
        """Return why there is no unit."""
        return ["no tensor is in scope (widen scope.include, or allow biases)"]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the tensors in scope."""
        return self._parameters

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, for each entry, the value of the unit that it belongs to."""
        return {name: self.entries(name, values).to(parameter) for name, parameter in self._parameters.items()}

    def removed(self) -> Kept:
        """Return which units are masked."""
        return {group: ~kept for group, kept in self.kept_in(self.masks).items()} if self.masks else {}

    def alive(self) -> dict[str, int]:
        """Return the number of units that are not zero: a network may have been pruned before."""
        found = self.kept_in({name: parameter != 0 for name, parameter in self._parameters.items()})
        return {group: int(kept.count_nonzero()) for group, kept in found.items()}

    def keep(self, kept: Kept) -> bool:
        """Zero all other units."""
        self.masks = {
            name: self.entries(name, kept).to(parameter.device, copy=True)
            for name, parameter in self._parameters.items()
        }
        Masks(self.model, self.masks).apply()
        return True

    def remaining(self, values: Scores, kept: Kept) -> Scores:
        """Return the values themselves: masked units stay listed."""
        return values

    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict, then zero the masked entries."""
        self.model.load_state_dict(state)
        Masks(self.model, self.masks).apply()

    def redraw(self) -> None:
        """Draw new weights, then zero the masked entries."""
        super().redraw()
        Masks(self.model, self.masks).apply()
