"""Network slimming: an L1 penalty on the scales of batch normalization, whose smallest channels then go.

Liu, Li, Shen, Huang, Yan, Zhang: Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
"""

from __future__ import annotations

from pydantic import Field

from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Scores, Units
from secateur.errors import NotApplicable
from secateur.parts.readers import channel_units
from secateur.parts.scales import batch_norm_scales, mean_scales


class Slimming(Criterion):
    """|gamma|, the size of a unit's scale in batch normalization, after training with a penalty on all of them.

    Attributes:
        penalty: Of the sum of |gamma| in the loss, until the last cut.
    """

    name = "slimming"
    learns = True
    penalty: float = Field(1e-4, ge=0)

    def hooks(self, run: Run) -> Hooks:
        """Return the sparsity training."""
        return _SparsityTraining(run, self.penalty)

    def score(self, context: Context) -> Scores:
        """Return the mean of |gamma| over the batch normalizations that each unit passes."""
        return _scores(context.units)


class _SparsityTraining(Hooks):
    """Adds the subgradient of the penalty to the gradients of the scales."""

    def __init__(self, run: Run, penalty: float) -> None:
        _scores(run.units)  # refuses the network before it is trained
        self._run, self._penalty = run, penalty

    def after_backward(self, state: TrainingState) -> None:
        if self._run.next_level is None:
            return
        for scale in batch_norm_scales(self._run.units).values():
            if scale.grad is not None:
                scale.grad.add_(scale.detach().sign(), alpha=self._penalty)


def _scores(units: Units) -> Scores:
    scales = mean_scales(channel_units(units, "Network slimming"))
    missing = sorted(units.shapes.keys() - scales.keys())
    if missing:
        some = f"scope={{'exclude': {missing[:3]}}}" + (" ..." if len(missing) > 3 else "")
        advice = f"Exclude these axes ({some})" if scales else "Use another criterion, for example 'magnitude' or 'sss'"
        raise NotApplicable(
            f"Network slimming ranks channels by their scale in batch normalization, and {len(missing)} of the "
            f"{len(units.shapes)} axes of {type(units.model).__name__} have none, for example {missing[0]!r}. {advice}."
        )
    return scales


METHOD = Method("slimming", Recipe(criterion=Slimming(), schedule=OneShot(at=0.5)))
