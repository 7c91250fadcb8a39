"""Single weights as units: pruning sets them to zero and keeps them there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.slots import Granularity, Scope
from secateur.core.units import Kept, Limits, Scores, Units
from secateur.structure.inputs import Inputs, as_inputs


class Weight(Granularity):
    """Each entry of a kernel is a unit (unstructured pruning)."""

    name = "weight"

    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> WeightUnits:
        """Return the entries of all tensors in scope as units."""
        return WeightUnits(model, as_inputs(example_inputs), scope)


class WeightUnits(Units):
    """The entries of a model's kernels."""

    limits = Limits()

    def __init__(self, model: nn.Module, inputs: Inputs, scope: Scope) -> None:
        self.model = model
        self.inputs = inputs
        self.masks: Kept = {}
        self._parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if (parameter.dim() > 1 or scope.biases) and scope.admits(name)
        }

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of the tensors in scope."""
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    def obstacles(self) -> list[str]:
        """Return why there is no unit."""
        return ["no tensor is in scope (widen scope.include, or allow biases)"]

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the tensors in scope."""
        return self._parameters

    def sum(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Return the values themselves: a unit has one entry."""
        return {name: values[name] for name in self._parameters}

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values themselves: a unit has one entry."""
        return {name: values[name].to(parameter) for name, parameter in self._parameters.items()}

    def removed(self) -> Kept:
        """Return the entries that are masked."""
        return {name: ~mask for name, mask in self.masks.items()}

    def alive(self) -> dict[str, int]:
        """Return the number of entries that are not zero: a network may have been pruned before."""
        return {name: int(parameter.count_nonzero()) for name, parameter in self._parameters.items()}

    def keep(self, kept: Kept) -> bool:
        """Zero all other entries; always possible."""
        self.masks = {name: mask.to(self._parameters[name].device, copy=True) for name, mask in kept.items()}
        Masks(self.model, self.masks).apply()
        return True

    def remaining(self, values: Scores, kept: Kept) -> Scores:
        """Return the values themselves: masked entries stay listed."""
        return values

    def exchange(self, kept: Kept) -> None:
        """Mask other entries than before, in place, so that whoever holds the masks follows; mutates `model`.

        Entries that come back are zero, and may be trained from now on.

        Args:
            kept: What is kept now, for the parameters that are masked.
        """
        for name, mask in kept.items():
            self.masks[name].copy_(mask)
        Masks(self.model, self.masks).apply()

    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict, then zero the masked entries."""
        self.model.load_state_dict(state)
        Masks(self.model, self.masks).apply()

    def redraw(self) -> None:
        """Draw new weights, then zero the masked entries."""
        super().redraw()
        Masks(self.model, self.masks).apply()
