"""Factors on weights in the forward pass: a factor of 0 masks its weight, and gradients reach the factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from secateur.core.units import Units
from secateur.errors import NotApplicable
from secateur.parts.granularity.masked import MaskedUnits


class WeightFactors:
    """The places at which the weights of a model are multiplied by the factors of their units, single ones or blocks.

    With W' = W x factor, dL/dfactor = dL/dW' x W for all entries, also masked ones, and dL/dW = dL/dW' x factor, which
    is zero for masked ones. The gradient by the factor of a block is the sum over its entries.

    Args:
        units: Single weights, or blocks of them.

    Raises:
        NotApplicable: Other units, or a module that reads its weights from a list of its own.
    """

    def __init__(self, units: Units) -> None:
        if not isinstance(units, MaskedUnits):
            raise NotApplicable("Factors stand at single weights or blocks: choose granularity='weight' or 'block'.")
        self._units = units
        names = {id(parameter): name for name, parameter in units.parameters().items()}
        self._places = [
            (module, key, names[id(parameter)])
            for module in units.model.modules()
            for key, parameter in module._parameters.items()
            if id(parameter) in names
        ]
        for module, _, name in self._places:
            if isinstance(module, nn.RNNBase):
                raise NotApplicable(
                    f"The weight {name!r} belongs to a {type(module).__name__}, which reads its weights from a list of "
                    "its own. Exclude it from the scope."
                )

    @contextmanager
    def applied(self, factors: Mapping[str, Tensor]) -> Iterator[None]:
        """Multiply weights by factors while this lasts; the parameters stay the same objects.

        Args:
            factors: By group. Parameters of which a group is not named are not multiplied. Their values may change in
                place meanwhile.
        """
        places = [place for place in self._places if factors.keys() >= set(self._units.groups_of(place[2]))]
        orders = [list(module._parameters) for module, _, _ in places]
        for module, key, name in places:
            register_parametrization(module, key, _Factor(self._units, name, factors), unsafe=True)
        try:
            yield
        finally:
            for (module, key, _), order in zip(places, orders, strict=True):
                remove_parametrizations(module, key, leave_parametrized=False)
                for own in order:  # removing puts a parameter last
                    if own in module._parameters:
                        module._parameters[own] = module._parameters.pop(own)


class _Factor(nn.Module):
    def __init__(self, units: MaskedUnits, name: str, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._units, self._name, self._factors = units, name, factors

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._units.entries(self._name, self._factors).to(weight.dtype)
