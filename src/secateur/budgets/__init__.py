"""What a network costs that keeps so many units: parameters, multiply-adds, memory, measured time."""

from __future__ import annotations

from collections.abc import Callable

from secateur.budgets.latency import latency_cost
from secateur.budgets.macs import macs_cost
from secateur.budgets.memory import bytes_cost
from secateur.budgets.params import params_cost, units_cost
from secateur.core.budget import Kind
from secateur.core.units import Cost, Units

_COSTS: dict[Kind, Callable[[Units], Cost]] = {
    "sparsity": units_cost,
    "params": params_cost,
    "macs": macs_cost,
    "bytes": bytes_cost,
    "latency_ms": latency_cost,
}


def cost_of(kind: Kind) -> Callable[[Units], Cost]:
    """Return the function that gives the cost, in the budgeted quantity, of a model's units."""
    return _COSTS[kind]
