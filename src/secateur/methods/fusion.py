"""Layer fusion: drop the residual branches for which the layer behind them can stand in best.

Ghods, Lan, Goldstein, Studer: MSE-Optimal Neural Network Initialization via Layer Fusion, CISS 2020 (arXiv 2001.10509).
Written from the paper; its code (raminaghods/FuseInit) was consulted for settings. That branches and the layers behind
them are fused, rather than neighbors in a plain network, is ours: see the card.
"""

from __future__ import annotations

import torch
from pydantic import Field

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Kept, Scores
from secateur.errors import NotApplicable
from secateur.parts.gates import Gates
from secateur.parts.granularity.depth import DepthUnits
from secateur.parts.repair.fusion import Fusion, layers_behind, pair_moments, take_over


class FusionError(Criterion):
    """The relative error of the next layer's output when a branch is dropped and the layer stands in for both.

    Attributes:
        ridge: See the repair `fusion`.
    """

    name = "fusion"
    ridge: float = Field(1e-4, ge=0)

    def score(self, context: Context) -> Scores:
        """Return errors in [0, 1]; two passes over the data for each branch."""
        units = context.units
        if not isinstance(units, DepthUnits):
            raise NotApplicable("Layer fusion drops residual branches: choose the granularity 'depth'.")
        scores = {}
        for group, shape in units.shapes.items():
            scores[group] = torch.zeros(shape, dtype=torch.float64)
            for i in range(shape.numel()):
                kept = {group: torch.arange(shape.numel()) != i}
                scores[group][i] = self._error(context, units, kept)
        return scores

    def _error(self, context: Context, units: DepthUnits, kept: Kept) -> float:
        gates = {group: mask.to(torch.get_default_dtype()) for group, mask in kept.items()}
        for path in layers_behind(units, kept):
            layer = units.model.get_submodule(path)
            moments = pair_moments(context, context, layer, Gates(units), gates)
            if moments is not None:
                return take_over(layer, moments, self.ridge).relative_error
        raise NotApplicable(
            "No linear or two-dimensional convolutional layer runs behind a branch, so that none can stand in for it. "
            "Exclude the branch from the scope."
        )


METHOD = Method("fusion", Recipe(criterion=FusionError(), granularity="depth", repair=Fusion()))
