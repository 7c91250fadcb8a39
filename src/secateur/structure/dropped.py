"""What stands in the place of a module whose branch was dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Dropped(nn.Module):
    """A module without parameters that returns zeros: what it computed was dropped.

    Args:
        entries: Length of the tuple that the module in this place returned; None if it returned a tensor.
    """

    def __init__(self, entries: int | None) -> None:
        super().__init__()
        self.entries = entries

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros shaped like the first tensor among the arguments; the other entries of a tuple are None."""
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        zeros = torch.zeros_like(first)
        return zeros if self.entries is None else (zeros, *[None] * (self.entries - 1))

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return "" if self.entries is None else f"entries={self.entries}"
