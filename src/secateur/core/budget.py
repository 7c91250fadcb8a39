"""The budget: a target on one measured quantity."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from secateur.core.value import Value
from secateur.errors import InvalidRecipe

Kind = Literal["params", "macs", "sparsity", "bytes", "latency_ms"]
KINDS: tuple[Kind, ...] = ("params", "macs", "sparsity", "bytes", "latency_ms")


class Budget(Value):
    """What the pruned network may cost; exactly one quantity is given.

    Attributes:
        params: Kept fraction of the parameters, in (0, 1).
        macs: Kept fraction of the multiply-adds, in (0, 1). With single weights as units: of the effective ones.
        sparsity: Removed fraction of the prunable units, in (0, 1).
        bytes: Size of the parameters and buffers in bytes.
        latency_ms: Median time of one call of the example inputs in milliseconds (PyTorch eager, this machine).
        tolerance: How far the result may lie above the target, relative to it, if the target itself cannot be reached.

    Example:
        >>> Budget(macs=0.5).kind
        'macs'
    """

    params: float | None = Field(None, gt=0, lt=1)
    macs: float | None = Field(None, gt=0, lt=1)
    sparsity: float | None = Field(None, gt=0, lt=1)
    bytes: int | None = Field(None, gt=0)
    latency_ms: float | None = Field(None, gt=0)
    tolerance: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise InvalidRecipe(f"A budget takes exactly one of {', '.join(KINDS)}; got {', '.join(given) or 'none'}.")
        return self

    @property
    def kind(self) -> Kind:
        """Which quantity is limited."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def value(self) -> float:
        """The number that was given for it."""
        return float(getattr(self, self.kind))

    def target(self, dense: float) -> float:
        """Return the allowed cost in the unit of `dense`, the cost of the unpruned network.

        For sparsity the cost is the number of kept units, rounded to the nearest whole one.
        """
        if self.kind == "sparsity":
            return float(round((1 - self.value) * dense))
        if self.kind in ("params", "macs"):
            return self.value * dense
        return self.value

    def nearest(self, cost: float, dense: float) -> str:
        """Return the tightest budget of this kind that a network of this cost meets, as a user would write it."""
        if self.kind == "sparsity":
            return f"sparsity={math.floor(1e4 * (1 - cost / dense)) / 1e4:.4f}"
        if self.kind in ("params", "macs"):
            return f"{self.kind}={math.ceil(1e4 * cost / dense) / 1e4:.4f}"
        return f"{self.kind}={math.ceil(100 * cost) / 100:g}"

    def __str__(self) -> str:
        if self.kind == "sparsity":
            return f"{self.value:.4g} of the units removed"
        if self.kind in ("params", "macs"):
            return f"{self.value:.4g} of the {'MACs' if self.kind == 'macs' else 'parameters'}"
        return f"{self.value:,.4g} {'bytes' if self.kind == 'bytes' else 'ms'}"
