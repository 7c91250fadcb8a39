"""A method: a named recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.core import registry
from secateur.core.recipe import Recipe
from secateur.core.registry import Card
from secateur.errors import InvalidRecipe


@dataclass(frozen=True)
class Method:
    """What a method file exports as ``METHOD``.

    Attributes:
        name: The file's name.
        recipe: The method with its default settings, for single weights if it has them.
        larger_units: Answers that differ for units of several weights.
    """

    name: str
    recipe: Recipe
    larger_units: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **slots: Any) -> Recipe:
        """Return the method's recipe with some slots answered differently; None leaves a slot as the method has it.

        Raises:
            InvalidRecipe: An unknown slot or setting.
        """
        recipe = self.recipe.but(**slots)
        if recipe.granularity.name == "weight":
            return recipe
        return recipe.but(**{slot: answer for slot, answer in self.larger_units.items() if slots.get(slot) is None})

    @property
    def card(self) -> Card:
        """The method's card."""
        return registry.cards()[self.name]


def method(name: str) -> Method:
    """Return a method by name.

    Raises:
        UnknownName: There is no such method; the message lists those there are.
    """
    found = getattr(registry.import_method(name), "METHOD", None)
    if not isinstance(found, Method) or found.name != name:
        raise InvalidRecipe(f"The file of method {name!r} must define METHOD = Method({name!r}, Recipe(...)).")
    return found


def methods() -> tuple[Card, ...]:
    """Return the cards of all methods, sorted by name."""
    return tuple(card for _, card in sorted(registry.cards().items()))
