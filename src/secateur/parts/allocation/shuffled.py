"""Shuffled masks: does a method choose units, or only how many of them each layer keeps?"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import BeforeValidator, SerializeAsAny

from secateur.core.slots import Allocation
from secateur.core.units import Kept, Scores


class Shuffled(Allocation):
    """As many units of each group as another allocation keeps, at random places within the group.

    A sanity check for any method (Su et al., arXiv 2009.11094; Frankle et al., arXiv 2009.08576). The method cuts as it
    would, with all of its rounds; only its last mask is shuffled.

    Attributes:
        of: The allocation that is meant.
    """

    name = "shuffled"
    revives: ClassVar[bool] = True
    of: Annotated[SerializeAsAny[Allocation], BeforeValidator(Allocation.parse)] = "global"  # type: ignore[assignment]

    def rank(self, scores: Scores) -> Scores:
        """Return what the other allocation says."""
        return self.of.rank(scores)

    def settle(self, kept: Kept) -> Kept:
        """Return each group's mask in random order, by PyTorch's global generator, which a run seeds."""
        kept = self.of.settle(kept)
        return {
            group: mask.flatten()[torch.randperm(mask.numel()).to(mask.device)].view(mask.shape)
            for group, mask in kept.items()
        }
