"""The methods, two files each: ``x.py`` reads like the paper's algorithm, ``x.md`` is its card.

``secateur.methods`` is this folder, and ``secateur.methods()`` lists it: Python gives a package and a function of one
name the same attribute, so the package is callable.
"""

from __future__ import annotations

import sys
from types import ModuleType

from secateur.core.method import methods
from secateur.core.registry import Card


class _Methods(ModuleType):
    def __call__(self) -> tuple[Card, ...]:
        """Return the cards of all methods, sorted by name."""
        return methods()


sys.modules[__name__].__class__ = _Methods
