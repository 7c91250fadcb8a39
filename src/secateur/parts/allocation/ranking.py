"""Allocations as rankings: scores become priorities that are comparable between groups."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.core.slots import Allocation
from secateur.core.units import Scores


class Global(Allocation):
    """All units compete in one ranking.

    Attributes:
        normalize: What each group's scores are divided by first: nothing, their mean, or their largest. Criteria
            whose size depends on the layer (norms of weights) need it; criteria that estimate a change of the loss
            do not.
    """

    name = "global"
    normalize: Literal["none", "mean", "max"] = "none"

    def rank(self, scores: Scores) -> Scores:
        """Return the scores, divided by the group's scale."""
        return {group: values / self._scale(values) for group, values in scores.items()}

    def _scale(self, values: Tensor) -> Tensor:
        size = values[values.isfinite()].abs()
        if self.normalize == "none" or size.numel() == 0:
            return values.new_ones(())
        size = size.mean() if self.normalize == "mean" else size.max()
        return size if size > 0 else values.new_ones(())


class Uniform(Allocation):
    """Every group loses the same fraction of its units, worst first."""

    name = "uniform"

    def rank(self, scores: Scores) -> Scores:
        """Return (n - r - 1/2) / n for the unit of rank r (0 = best) among n."""
        return {group: (values.numel() - ranks(values) - 0.5) / values.numel() for group, values in scores.items()}


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each unit of a group, 0 = best, in float64; among equals the first one is best."""
    best_first = values.flatten().sort(descending=True, stable=True).indices
    found = torch.empty(values.numel(), dtype=torch.float64, device=values.device)
    found[best_first] = torch.arange(values.numel(), dtype=torch.float64, device=values.device)
    return found.view(values.shape)
