"""CKA: drop the residual branches without which the network sees the samples as before.

Similarity of representations as in Tang et al. (arXiv 2003.11498) and Kornblith et al. (ICML 2019), see
`secateur.measure.similarity`. That it ranks branches is our extension: these papers do not prune.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.errors import NotApplicable
from secateur.measure.similarity import cka, kernels, some_samples
from secateur.parts.gates import Gates
from secateur.parts.granularity.depth import DepthUnits


class CKA(Criterion):
    """How much the representation before the last layer changes when a branch is dropped: 1 - CKA.

    Attributes:
        gradients: Compare features and their gradients, not features alone.
        samples: How many samples are compared, the first ones of the data.
    """

    name = "cka"
    gradients: bool = False
    samples: int = Field(512, ge=2)

    def score(self, context: Context) -> Scores:
        """Return changes in [0, 1]; for each branch, and once more, the samples go through the network."""
        units = context.units
        if not isinstance(units, DepthUnits):
            raise NotApplicable("CKA ranks residual branches: choose the granularity 'depth'.")
        gates, last = Gates(units), last_layer(units)

        def kernel() -> torch.Tensor:
            batches = some_samples(context.batches(), self.samples)
            return kernels(units.model, batches, [last], at="input", gradients=self.gradients)[last]

        dense, scores = kernel(), {}
        for group, shape in units.shapes.items():
            scores[group] = torch.zeros(shape, dtype=torch.float64)
            for i in range(shape.numel()):
                open_but_one = torch.ones(shape).index_fill_(0, torch.tensor([i]), 0)
                with gates.applied({group: open_but_one}):
                    scores[group][i] = 1 - cka(dense, kernel())
        return scores


def last_layer(units: DepthUnits) -> str:
    """Return the path of the last linear or convolutional layer that runs."""
    paths = [name.rpartition(".")[0] for name in units.structure.order]
    modules = dict(units.model.named_modules())
    return next(p for p in reversed(paths) if isinstance(modules.get(p), nn.Linear | nn.modules.conv._ConvNd))


METHOD = Method("cka", Recipe(criterion=CKA(), granularity="depth"))
