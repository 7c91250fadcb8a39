"""GraSP: what is pruned before training is what hinders the gradient from flowing.

Wang, Zhang, Grosse: Picking Winning Tickets Before Training by Preserving Gradient Flow, ICLR 2020, eqs. 6 to 8.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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


class Grasp(Criterion):
    """How much the squared norm of the gradient would fall if a unit were removed: theta (H g), to first order.

    Attributes:
        temperature: Divides the logits in the cross-entropy whose gradient g and Hessian H are meant. None: the loss
            of the training as it is.
    """

    name = "grasp"
    temperature: float | None = Field(200.0, gt=0)

    def score(self, context: Context) -> Scores:
        """Return theta (H g), the sum over each unit; two passes over the data, one of them differentiated twice."""
        if self.temperature is not None:
            context = context.but(loss=partial(tempered, temperature=self.temperature))
        curved = context.hessian_vector_product(context.gradients())
        return context.sum_over_units({name: weight * curved[name] for name, weight in context.weights.items()})


def tempered(output: Any, target: Any, temperature: float) -> Tensor:
    """Return the cross-entropy of logits that are divided by the temperature.

    Raises:
        NotApplicable: The targets are no classes.
    """
    logits, labels = logits_and_labels(output, target)
    if labels.is_floating_point():
        raise NotApplicable(
            "The temperature divides the logits of classes, and these targets are real numbers: set "
            "criterion={'name': 'grasp', 'temperature': None} to use the loss of the training."
        )
    return F.cross_entropy(logits / temperature, labels)


METHOD = Method("grasp", Recipe(criterion=Grasp(), mask_from="init", weights_from="init"))
