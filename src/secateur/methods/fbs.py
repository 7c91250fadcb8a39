"""Feature boosting and suppression (FBS): each input has its own channels, chosen before they are computed.

Gao, Zhao, Dudziak, Mullins, Xu: Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019. Written from the
paper; its reference code (deep-fry/mayo) was consulted for hyperparameters and departures. Predictors, gates and the
real skipping are in `secateur.structure.gated`, where a loaded network finds them too. Deviations are on the card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.batches import batch_size
from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import Linear
from secateur.core.slots import Criterion
from secateur.core.units import Scores, Units
from secateur.errors import NotApplicable
from secateur.parts.allocation.ranking import Uniform
from secateur.parts.granularity.channel_per_input import ChannelPerInput, GatedUnits
from secateur.structure.gated import GatedConv2d


class FBS(Criterion):
    """The mean saliency of the channel that takes a place: of the most salient one of each input, of the second, ...

    Attributes:
        penalty: Weight of the lasso on the saliencies, the sum over layers of the mean over samples of ||g(x)||_1.
        deviation: Of the predictors' first weights, which are normal and at most twice as large. With 0 the training
            begins with exactly the given network, and with the same saliencies for all inputs.
    """

    name = "fbs"
    learns = True
    penalty: float = Field(1e-8, ge=0)
    deviation: float = Field(0.05, ge=0)

    def hooks(self, run: Run) -> Hooks:
        """Return what draws the predictors and adds the lasso to the loss."""
        return Boosting(run, self)

    def score(self, context: Context) -> Scores:
        """Return the mean saliency of each place; one pass over the data."""
        gates, total, samples = gates_in(context.units), dict[str, Tensor](), 0
        for batch in context.batches():
            with context.undisturbed(), torch.no_grad(), saliencies(gates) as found:
                context.forward(batch)
            samples += batch_size(batch)
            for path, saliency in found.items():
                ranked = saliency.double().sort(1, descending=True).values.sum(0)
                total[path] = total[path] + ranked if path in total else ranked
        return context.mean_over_processes({path: values / samples for path, values in total.items()}, samples)


class Boosting(Hooks):
    """Trains the predictors with the network, under a penalty on the saliencies of the batch that it has just seen."""

    def __init__(self, run: Run, settings: FBS) -> None:
        self._gates, self._settings, self._seed = gates_in(run.units), settings, run.seed
        self._seen: dict[str, Tensor] = {}
        self._listening = ExitStack()

    def on_start(self, state: TrainingState) -> None:
        """Draw the predictors, once, and listen to them; mutates the model.

        An optimizer that was made before there were gates trains them, too; mutates it.
        """
        if state.step == 0:
            self._draw()
        known = {id(parameter) for group in state.optimizer.param_groups for parameter in group["params"]}
        new = [p for gate in self._gates.values() for p in gate.saliency.parameters() if id(p) not in known]
        state.optimizer.param_groups[0]["params"].extend(new)
        self._seen = self._listening.enter_context(saliencies(self._gates))

    @torch.no_grad()
    def _draw(self) -> None:
        generator, std = torch.Generator().manual_seed(self._seed), self._settings.deviation
        for gate in self._gates.values() if std else ():
            weight = gate.saliency.weight
            drawn = torch.empty(weight.shape, dtype=weight.dtype)
            weight.copy_(nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator))

    def loss_term(self, state: TrainingState) -> Tensor | None:
        """Return lambda times the sum over layers of the mean over samples of ||g(x)||_1."""
        norms = [saliency.sum(1).mean() for saliency in self._seen.values()]
        self._seen.clear()
        return self._settings.penalty * torch.stack(norms).sum() if norms else None

    def on_end(self, state: TrainingState) -> None:
        """Listen no more."""
        self._listening.close()
        self._seen.clear()


def gates_in(units: Units) -> Mapping[str, GatedConv2d]:
    """Return the gated convolutions.

    Raises:
        NotApplicable: The units are of another granularity.
    """
    if not isinstance(units, GatedUnits):
        raise NotApplicable("FBS chooses the channels of each input: use it with granularity='channel-per-input'.")
    return units.gates


@contextmanager
def saliencies(gates: Mapping[str, GatedConv2d]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds, after each forward pass, the saliencies (samples, channels) that it has predicted."""
    found: dict[str, Tensor] = {}

    def into(path: str) -> Any:
        def record(module: nn.Module, args: Any, saliency: Tensor) -> None:
            found[path] = saliency

        return record

    with ExitStack() as stack:
        for path, gate in gates.items():
            stack.callback(gate.saliency.register_forward_hook(into(path)).remove)
        yield found


METHOD = Method(
    "fbs",
    Recipe(
        criterion=FBS(),
        granularity=ChannelPerInput(),
        allocation=Uniform(),
        schedule=Linear(steps=5, start=0.2, end=0.6),
    ),
)
