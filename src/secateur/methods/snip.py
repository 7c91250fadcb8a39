"""SNIP: the weights of an untrained network without which its loss would change least go first.

Lee, Ajanthan, Torr: SNIP: Single-shot Network Pruning based on Connection Sensitivity, ICLR 2019, eqs. 4 to 6. With
`force`: de Jorge et al.: Progressive Skeletonization, ICLR 2021, algorithm 1. Deviations are on the card.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from secateur.core.batches import logits_and_labels
from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.errors import NotApplicable
from secateur.parts.sensitivity import sensitivity


class Snip(Criterion):
    """Connection sensitivity |theta dL/dtheta| on the initial weights.

    Attributes:
        loss: ``ce``: the loss of the training, which is cross-entropy unless another one is given. ``neg_logit``: minus
            the logit of the true class, as the reference code of FORCE has it.
        force: Steps of progressive skeletonization. With more than 1, all weights are scored again where the pruned
            network stands, so that those that were pruned may come back; the kept share falls exponentially.
    """

    name = "snip"
    loss: Literal["ce", "neg_logit"] = "ce"
    force: int = Field(1, ge=1)

    def score(self, context: Context) -> Scores:
        """Return the sensitivity of each unit; `force` passes over the data."""
        context = context.but(loss=negative_logit) if self.loss == "neg_logit" else context
        weights = context.weights
        scores = sensitivity(context, weights, context.gradients())
        for step in range(1, self.force):
            kept = context.choose(scores, context.keep ** (step / self.force))
            if kept.keys() != weights.keys():
                raise NotApplicable("Progressive skeletonization (force) masks single weights: granularity='weight'.")
            pruned = context.but(values={name: weight * kept[name] for name, weight in weights.items()})
            scores = sensitivity(context, weights, pruned.gradients())
        return scores


def negative_logit(output: Any, target: Any) -> Tensor:
    """Return minus the mean logit of the true class."""
    return F.nll_loss(*logits_and_labels(output, target))


METHOD = Method("snip", Recipe(criterion=Snip(), mask_from="init", weights_from="init"))
