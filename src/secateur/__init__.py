"""secateur prunes neural networks: physically smaller, proved equal to the masked network, measured in real engines."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import load, prune, save
    from secateur.bench.compare import Comparison, compare
    from secateur.core.budget import Budget
    from secateur.core.context import Context
    from secateur.core.masks import Masks
    from secateur.core.method import Method, method, methods
    from secateur.core.recipe import Recipe
    from secateur.core.slots import Criterion, Scope
    from secateur.errors import SecateurError
    from secateur.measure.latency import Latency, compare_latency, measure_latency
    from secateur.measure.profile import Profile, profile
    from secateur.measure.trainability import Trainability, trainability
    from secateur.pruned import Pruned
    from secateur.pruner import Pruner
    from secateur.structure.structure import Axis, Structure
    from secateur.structure.trace import trace
    from secateur.structure.twin import verify_by_twin
    from secateur.structure.verify import Verification

__version__ = "0.1.0"

# Where each public name lives. Imported on first use, so that `secateur --help` need not wait for PyTorch.
_HOMES = {
    "Axis": "structure.structure",
    "Budget": "core.budget",
    "Comparison": "bench.compare",
    "Context": "core.context",
    "Criterion": "core.slots",
    "Latency": "measure.latency",
    "Masks": "core.masks",
    "Method": "core.method",
    "Profile": "measure.profile",
    "Pruned": "pruned",
    "Pruner": "pruner",
    "Recipe": "core.recipe",
    "Scope": "core.slots",
    "SecateurError": "errors",
    "Structure": "structure.structure",
    "Trainability": "measure.trainability",
    "Verification": "structure.verify",
    "compare": "bench.compare",
    "compare_latency": "measure.latency",
    "load": "api",
    "measure_latency": "measure.latency",
    "method": "core.method",
    "methods": "methods",
    "profile": "measure.profile",
    "prune": "api",
    "save": "api",
    "trace": "structure.trace",
    "trainability": "measure.trainability",
    "verify_by_twin": "structure.twin",
}

__all__ = [
    "Axis",
    "Budget",
    "Comparison",
    "Context",
    "Criterion",
    "Latency",
    "Masks",
    "Method",
    "Profile",
    "Pruned",
    "Pruner",
    "Recipe",
    "Scope",
    "SecateurError",
    "Structure",
    "Trainability",
    "Verification",
    "compare",
    "compare_latency",
    "load",
    "measure_latency",
    "method",
    "methods",
    "profile",
    "prune",
    "save",
    "trace",
    "trainability",
    "verify_by_twin",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    module = import_module(f"secateur.{_HOMES[name]}")
    return module if name == "methods" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
