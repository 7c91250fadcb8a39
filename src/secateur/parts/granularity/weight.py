"""Single weights as units: pruning sets them to zero and keeps them there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.slots import Granularity, Scope
from secateur.core.units import Kept, Scores
from secateur.parts.granularity.masked import MaskedUnits
from secateur.structure.inputs import Inputs, as_inputs


class Weight(Granularity):
    """Each entry of a kernel is a unit (unstructured pruning)."""

    name = "weight"

    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> WeightUnits:
        """Return the entries of all tensors in scope as units."""
        return WeightUnits(model, as_inputs(example_inputs), scope)


class WeightUnits(MaskedUnits):
    """The entries of a model's kernels; each tensor is a group."""

    def __init__(self, model: nn.Module, inputs: Inputs, scope: Scope) -> None:
        super().__init__(model, inputs, scope, scope.biases)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shapes of the tensors in scope."""
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    def groups_of(self, name: str) -> tuple[str, ...]:
        """Return the tensor itself."""
        return (name,)

    def size(self, group: str) -> int:
        """Return 1: a unit has one entry."""
        return 1

    def sum(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Return the values themselves: a unit has one entry."""
        return {name: values[name] for name in self._parameters}

    def entries(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """Return the values themselves: a unit has one entry."""
        return values[name]

    def kept_in(self, masks: Mapping[str, Tensor]) -> Kept:
        """Return the masks themselves: a unit has one entry."""
        return dict(masks)

    def exchange(self, kept: Kept) -> None:
        """Mask other entries than before, in place, so that whoever holds the masks follows; mutates `model`.

        Entries that come back are zero, and may be trained from now on.

        Args:
            kept: What is kept now, for the parameters that are masked.
        """
        for name, mask in kept.items():
            self.masks[name].copy_(mask)
        Masks(self.model, self.masks).apply()
