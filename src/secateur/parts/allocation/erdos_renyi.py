"""Erdős-Rényi allocations: large tensors are pruned more than small ones, by their shapes alone."""

from __future__ import annotations

from math import prod

import torch

from secateur.core.slots import Allocation
from secateur.core.units import Scores
from secateur.parts.allocation.ranking import ranks


class ERK(Allocation):
    """Densities proportional to (sum of dims) / (product of dims), with all dims of a kernel (Evci et al., RigL).

    A tensor of n entries keeps min(n, eps x sum of dims) of them, with the one eps for all tensors that meets the
    budget, to the unit; groups that are vectors (channels) all keep the same fraction. Evci, Gale, Menick, Castro,
    Elsen: Rigging the Lottery, ICML 2020, section 3 (1).
    """

    name = "erk"

    def rank(self, scores: Scores) -> Scores:
        """Return -(r + 1/2) / (sum of dims) for the unit of rank r (0 = best): what -eps must fall below to keep it."""
        return {group: -(ranks(values) + 0.5) / self._share(values.shape) for group, values in scores.items()}

    def _share(self, shape: torch.Size) -> float:
        """Return to what a tensor's number of kept entries is proportional."""
        return sum(shape)


class ER(ERK):
    """Densities proportional to (inputs + outputs) / (inputs x outputs), whatever the kernel (Mocanu et al., SET)."""

    name = "er"

    def _share(self, shape: torch.Size) -> float:
        return sum(shape[:2]) * prod(shape[2:])
