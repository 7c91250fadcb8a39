"""Magnitude pruning: small weights, and units made of small weights, matter least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field
from torch import Tensor

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores


class Magnitude(Criterion):
    """The Lp norm of all weights that a unit consists of (Han et al. 2015 for weights, Li et al. 2017 for filters).

    Single weights are compared as they are. Norms of whole units depend on how many weights a unit of that layer
    has, so they are compared relative to the mean norm of their group.

    Attributes:
        p: 1 for the L1 norm, 2 for the L2 norm. For single weights every p gives the same order.
    """

    name = "magnitude"
    weights_alone = True
    p: float = Field(2.0, gt=0)

    def score(self, context: Context) -> Scores:
        """Return (sum of |w|^p)^(1/p) over each unit; relative to the group's mean if units have several weights."""
        weights = context.weights
        if context.units.shapes == {name: weight.shape for name, weight in weights.items()}:
            return {name: weight.abs() for name, weight in weights.items()}
        powers = context.sum_over_units(_Powers(weights, self.p))
        norms = {group: total ** (1 / self.p) for group, total in powers.items()}
        return {group: norm / norm.mean().clamp_min(1e-30) for group, norm in norms.items()}


class _Powers(Mapping[str, Tensor]):
    """|w|^p of each weight, worked out when it is asked for: all at once would take as much memory as the model."""

    def __init__(self, weights: Mapping[str, Tensor], p: float) -> None:
        self._weights, self._p = weights, p

    def __getitem__(self, name: str) -> Tensor:
        weight = self._weights[name]
        plain = self._p == 2 and not weight.is_complex()
        return weight.square() if plain else weight.abs().pow_(self._p)

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # by default, asking works the powers out

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


METHOD = Method("magnitude", Recipe(criterion=Magnitude()))
