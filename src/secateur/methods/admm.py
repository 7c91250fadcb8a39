"""ADMM pruning: training and projection onto sparse networks by turns, until the two agree.

Zhang, Ye, Zhang, Tang, Wen, Fardad, Wang: A Systematic DNN Weight Pruning Framework using Alternating Direction Method
of Multipliers, ECCV 2018. Written from the paper; its reference code (KaiqiZhang/admm-pruning) was consulted for
hyperparameters and departures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from secateur.core.context import Context, Values
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Scores, Units
from secateur.parts.allocation.erdos_renyi import ERK


class ADMM(Criterion):
    """The L2 norm of a unit, after training has drawn the network to a sparse one.

    Attributes:
        rhos: Strengths of the pull, each for an equal share of the iterations.
        iterations: Number of projections in the training before the cut.
    """

    name = "admm"
    learns = True
    rhos: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1e-3, 1e-2, 1e-1, 1.0)
    iterations: int = Field(16, ge=1)

    def hooks(self, run: Run) -> Hooks:
        """Return what pulls the weights to their projection until the cut."""
        return _Splitting(run, self)

    def score(self, context: Context) -> Scores:
        """Return the norms of the units."""
        return _norms(context.units, context.weights)


class _Splitting(Hooks):
    """Weights W, their sparse copy Z, and the scaled dual U of W = Z.

    Attributes:
        residuals: ||W - Z|| / ||W|| after each projection.
    """

    def __init__(self, run: Run, settings: ADMM) -> None:
        self.run, self.settings = run, settings
        self.sparse: Values = {}
        self.dual: Values = {}
        self.done = 0
        self.residuals: list[float] = []

    @property
    def rho(self) -> float:
        """The present strength."""
        rhos = self.settings.rhos
        return rhos[min(self.done * len(rhos) // self.settings.iterations, len(rhos) - 1)]

    @torch.no_grad()
    def on_start(self, state: TrainingState) -> None:
        self.done = 0
        if self.run.next_level is not None:
            weights = self._weights()
            self.sparse = self.projected(weights)
            self.dual = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    @torch.no_grad()
    def after_backward(self, state: TrainingState) -> None:
        """Add rho (W - Z + U) to the gradients."""
        if self.run.next_level is None:
            return
        live = {name: p for name, p in self.run.units.parameters().items() if p.grad is not None}
        pulls = torch._foreach_sub(list(live.values()), [self.sparse[name] for name in live])
        torch._foreach_add_(pulls, [self.dual[name] for name in live])
        gradients: list[Any] = [p.grad for p in live.values()]
        torch._foreach_add_(gradients, pulls, alpha=self.rho)

    @torch.no_grad()
    def after_step(self, state: TrainingState) -> None:
        if self.run.next_level is not None and state.progress * self.settings.iterations >= self.done + 1:
            self._project()

    def on_end(self, state: TrainingState) -> None:
        """Let the optimizer forget the pull, which its momentum would carry into the retraining."""
        if self.run.next_level is not None:
            for parameter in self.run.units.parameters().values():
                state.optimizer.state.pop(parameter, None)

    def _project(self) -> None:
        """Z = projection of W + U, U = U + W - Z; then U follows rho, so that rho U stays what it was."""
        weights, before = self._weights(), self.rho
        self.sparse = self.projected({name: weight + self.dual[name] for name, weight in weights.items()})
        gaps = {name: weight - self.sparse[name] for name, weight in weights.items()}
        self.residuals.append(_size(gaps) / _size(weights))
        self.done += 1
        self.dual = {name: (self.dual[name] + gap) * (before / self.rho) for name, gap in gaps.items()}

    def projected(self, values: Values) -> Values:
        """Return the values with every entry zeroed that belongs to a unit which a cut by their norms would remove."""
        level = self.run.next_level
        assert level is not None
        kept = self.run.choose(_norms(self.run.units, values), level.keep)
        removed = self.run.units.spread({group: ~mask for group, mask in kept.items()})
        return {name: value.masked_fill(removed[name] > 0, 0.0) for name, value in values.items()}

    def _weights(self) -> Values:
        return {name: parameter.detach() for name, parameter in self.run.units.parameters().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sparse": self.sparse, "dual": self.dual, "done": self.done, "residuals": self.residuals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sparse, self.dual = dict(state["sparse"]), dict(state["dual"])
        self.done, self.residuals = state["done"], list(state["residuals"])


def _norms(units: Units, values: Values) -> Scores:
    return {group: total.sqrt() for group, total in units.sum({n: v.square() for n, v in values.items()}).items()}


def _size(values: Values) -> float:
    return float(torch.stack(torch._foreach_norm(list(values.values()))).norm())


METHOD = Method("admm", Recipe(criterion=ADMM(), allocation=ERK(), schedule=OneShot(at=0.5)))
