"""Fisher pruning: the mean square of every sample's own first-order change of the loss.

Theis, Korshunova, Tejani, Huszar: Faster gaze prediction with dense networks and Fisher pruning, 2018 (arXiv
1801.05787); the form of Crowley, Turner, Storkey, O'Boyle: A Closer Look at Structured Pruning for Neural Network
Compression, 2018 (arXiv 1810.04622). The empirical Fisher information stands for the Hessian.
"""

from __future__ import annotations

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.parts.allocation.ranking import Global
from secateur.parts.gates import gate_gradients


class Fisher(Criterion):
    """1/(2N) sum over samples n of g_n², g_n = dL_n/dz: the derivative of the sample's loss by the unit's gate z = 1.

    At a channel of activations a, g_n is the sum over positions of a dL_n/da.
    """

    name = "fisher"

    def score(self, context: Context) -> Scores:
        """Return the expected change of the loss when each unit is removed; one pass over the data."""
        total: Scores = {}
        for slopes in gate_gradients(context):
            squares = {group: slope.square().sum(0) for group, slope in slopes.items()}
            total = squares if not total else {group: total[group] + s for group, s in squares.items()}
        samples = context.samples_used
        return context.mean_over_processes({group: t / (2 * samples) for group, t in total.items()}, samples)


METHOD = Method("fisher", Recipe(criterion=Fisher(), allocation=Global(normalize="mean")))
