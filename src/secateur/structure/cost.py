"""Costs that are sums of products of sizes: multiply-adds, parameters, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from math import prod

from secateur.structure.dims import Dim, leaves, size_under
from secateur.structure.structure import Structure


class ProductCost:
    """The sum over terms of a factor times the product of the sizes of some dims.

    A selection asks for the cost again and again while the counts of a few axes change, so only the terms that those
    axes are part of are worked out anew.
    """

    def __init__(self, structure: Structure, terms: Iterable[tuple[int, tuple[Dim, ...]]]) -> None:
        self._structure = structure
        self._terms = list(terms)
        self._terms_of: dict[Dim, list[int]] = defaultdict(list)
        for i, (_, dims) in enumerate(self._terms):
            for leaf in {leaf for dim in dims for leaf in leaves(dim)}:
                self._terms_of[leaf].append(i)
        self._sizes: dict[Dim, int] = {}
        self._values = [self._value(i) for i in range(len(self._terms))]
        self._total = sum(self._values)

    def _value(self, i: int) -> int:
        factor, dims = self._terms[i]
        return factor * prod(size_under(dim, self._sizes) for dim in dims)

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Return the cost if each axis kept so many units; axes that are not named are whole."""
        before, self._sizes = self._sizes, self._structure.sizes(counts)
        present = self._sizes
        leaves_of_both = before.keys() | present.keys()
        changed = [n for n in leaves_of_both if before.get(n, n.size) != present.get(n, n.size)]
        for i in {i for leaf in changed for i in self._terms_of[leaf]}:
            value = self._value(i)
            self._total += value - self._values[i]
            self._values[i] = value
        return self._total
