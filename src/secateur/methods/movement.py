"""Movement pruning: scores that are trained with the weights say which weights move away from zero.

Sanh, Wolf, Rush: Movement Pruning: Adaptive Sparsity by Fine-Tuning, NeurIPS 2020; whole units: Lagunas, Charlaix,
Sanh, Rush: Block Pruning For Faster Transformers, EMNLP 2021; the L0 baseline: Louizos, Welling, Kingma, ICLR 2018.
Written from the papers; the code of huggingface/transformers (movement-pruning) and of huggingface/nn_pruning was
consulted for hyperparameters and departures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.randomness import generator_for
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.errors import NotApplicable
from secateur.parts.allocation.ranking import Uniform
from secateur.parts.gates import Gates
from secateur.parts.granularity.masked import MaskedUnits
from secateur.parts.granularity.weight import WeightUnits
from secateur.parts.weight_factors import WeightFactors

STRETCH = (-0.1, 1.1)
"""Ends of the hard concrete distribution before it is clipped to [0, 1]."""
FIRST_SCORES = 0.01
"""Size of the first scores, in steps of their optimizer."""
TEMPERATURE = 2 / 3
"""Of the hard concrete distribution."""


class Movement(Criterion):
    """Scores S, one per unit, trained by the gradient of the loss with respect to the mask.

    Attributes:
        mask: ``hard``: the units of largest S, as many as a cubic schedule says (movement pruning). ``soft``: those
            with sigmoid(S) above a threshold, S being pulled down by a penalty (soft movement pruning). ``l0``: random
            factors of the hard concrete distribution, S being pulled down by the expected number of non-zeros (the L0
            baseline; single weights only).
        lr: Learning rate of the scores.
        warmup: Share of the training before the cut in which nothing is masked and the scores' learning rate rises.
        cooldown: Final share in which threshold, penalty and number of units stay.
        penalty: Final weight of the penalty on the scores (``soft`` and ``l0``).
        threshold: Final threshold on sigmoid(S) (``soft``), in (0, 1).
        every: After how many steps the mask is chosen anew (``hard``).
    """

    name = "movement"
    learns = True
    mask: Literal["hard", "soft", "l0"] = "hard"
    lr: float = Field(0.01, gt=0)
    warmup: float = Field(0.1, ge=0, lt=0.5)
    cooldown: float = Field(0.2, ge=0, lt=0.5)
    penalty: float = Field(100.0, ge=0)
    threshold: float = Field(0.1, gt=0, lt=1)
    every: int = Field(1, ge=1)

    def hooks(self, run: Run) -> Hooks:
        """Return what masks the forward pass and trains the scores until the cut."""
        return {"hard": _Hard, "soft": _Soft, "l0": _L0}[self.mask](run, self)

    def score(self, context: Context) -> Scores:
        """Return the scores as they were learned."""
        assert isinstance(context.learned, _LearnedScores)
        return {group: values.detach().clone() for group, values in context.learned.scores.items()}


class _LearnedScores(Hooks):
    """Multiplies units by factors in the forward pass, and trains the scores behind these.

    Attributes:
        scores: S, by group.
        factors: What units are multiplied by at present, by group; its gradient is dL/dfactor.
    """

    start = 0.0
    """First value of all scores."""

    def __init__(self, run: Run, settings: Movement) -> None:
        self.run, self.settings = run, settings
        self._places = WeightFactors(run.units) if isinstance(run.units, MaskedUnits) else Gates(run.units)
        self._generator = generator_for("masks", run.seed)
        self._masked = ExitStack()
        self.scores: Scores = {}
        self.factors: Scores = {}

    def on_start(self, state: TrainingState) -> None:
        if self.run.next_level is None:
            return
        self.scores = {}
        device = next(iter(self.run.units.parameters().values())).device
        sizes = self.run.units.sum({n: p.detach().abs().float() for n, p in self.run.units.parameters().items()})
        for group, size in sizes.items():
            # All scores begin equal. What is added decides between equals in the first masks: by size, not by index.
            first = self.start + FIRST_SCORES * self.settings.lr * size / size.max().clamp_min(1e-30)
            self.scores[group] = first.to(device).requires_grad_()
            self.factors[group] = torch.ones_like(self.scores[group], requires_grad=True)
        self.optimizer: Optimizer = torch.optim.Adam(list(self.scores.values()))
        self._masked.enter_context(self._places.applied(self.factors))
        self._mask(state)

    def after_backward(self, state: TrainingState) -> None:
        """Train the scores by what the gradient says of the factors."""
        if not self.factors:
            return
        for group, factor in self.factors.items():
            slope = torch.zeros_like(factor) if factor.grad is None else factor.grad
            self.scores[group].grad, factor.grad = self.gradient(group, slope, state), None
        for options in self.optimizer.param_groups:
            options["lr"] = self.learning_rate(state.progress)
        self.optimizer.step()

    def after_step(self, state: TrainingState) -> None:
        if self.factors and state.step % self.settings.every == 0:
            self._mask(state)

    def on_end(self, state: TrainingState) -> None:
        self._masked.close()
        self.factors = {}

    @torch.no_grad()
    def _mask(self, state: TrainingState) -> None:
        for group, values in self.masks(state).items():
            self.factors[group].copy_(values)

    def masks(self, state: TrainingState) -> Scores:
        """Return what units are multiplied by from now on."""
        raise NotImplementedError

    def gradient(self, group: str, slope: Tensor, state: TrainingState) -> Tensor:
        """Return the gradient by a group's scores, given that by its factors; straight through, it is the same."""
        return slope

    def learning_rate(self, progress: float) -> float:
        """Return the scores' learning rate: it rises linearly, then falls linearly to zero."""
        warmup = self.settings.warmup
        return self.settings.lr * (progress / warmup if progress < warmup else (1 - progress) / (1 - warmup))

    def ramp(self, progress: float, first: float, last: float) -> float:
        """Return the cubic schedule between two values (Zhu and Gupta, eq. 1)."""
        s = self.settings
        left = 1 - (progress - s.warmup) / (1 - s.warmup - s.cooldown)
        return last + (first - last) * min(1.0, max(0.0, left)) ** 3

    def state_dict(self) -> dict[str, Any]:
        if not self.factors:
            return {"scores": {g: s.detach() for g, s in self.scores.items()}}
        return {
            "scores": {g: s.detach() for g, s in self.scores.items()},
            "factors": {g: f.detach() for g, f in self.factors.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self.factors:
            self.scores = {g: values.clone() for g, values in state["scores"].items()}
            return
        for group, score in self.scores.items():
            score.copy_(state["scores"][group])
            self.factors[group].copy_(state["factors"][group])
        self.optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])


class _Hard(_LearnedScores):
    """Movement pruning: the units of largest S, ever fewer."""

    def masks(self, state: TrainingState) -> Scores:
        level = self.run.next_level
        assert level is not None
        keep = self.ramp(state.progress, 1.0, level.keep)
        if keep == 1:
            return {group: torch.ones_like(score) for group, score in self.scores.items()}
        return self.run.choose({group: score.detach() for group, score in self.scores.items()}, keep)


class _Soft(_LearnedScores):
    """Soft movement pruning: the units with sigmoid(S) above a rising threshold, S being pulled down ever harder."""

    def masks(self, state: TrainingState) -> Scores:
        threshold = self.ramp(state.progress, 0.0, self.settings.threshold)
        return {group: torch.sigmoid(score) > threshold for group, score in self.scores.items()}

    def gradient(self, group: str, slope: Tensor, state: TrainingState) -> Tensor:
        """Return the slope plus that of the penalty: the mean of sigmoid(S) over a group, averaged over groups."""
        on = torch.sigmoid(self.scores[group].detach())
        strength = self.settings.penalty * self.ramp(state.progress, 0.0, 1.0) / (len(self.scores) * on.numel())
        return slope + strength * on * (1 - on)


class _L0(_LearnedScores):
    """The L0 baseline: factors drawn from the hard concrete distribution, with their true gradient."""

    start = math.log(9)  # a chance of 0.9

    def __init__(self, run: Run, settings: Movement) -> None:
        super().__init__(run, settings)
        if not isinstance(run.units, WeightUnits):
            raise NotApplicable(
                "The L0 baseline of movement pruning masks single weights: choose granularity='weight'."
            )
        self._noise: Scores = {}

    def masks(self, state: TrainingState) -> Scores:
        draws = {g: torch.rand(s.shape, generator=self._generator).to(s.device) for g, s in self.scores.items()}
        self._noise = {group: torch.logit(u, eps=1e-6) for group, u in draws.items()}
        return {group: hard_concrete(score, self._noise[group]) for group, score in self.scores.items()}

    def gradient(self, group: str, slope: Tensor, state: TrainingState) -> Tensor:
        """Return the true gradient through the factor, plus that of the mean expected number of non-zeros."""
        score = self.scores[group].detach().requires_grad_()
        with torch.enable_grad():
            penalty = self.settings.penalty / len(self.scores) * chance_of_nonzero(score).mean()
            total = penalty + (hard_concrete(score, self._noise[group]) * slope).sum()
        return torch.autograd.grad(total, score)[0]

    @torch.no_grad()
    def on_end(self, state: TrainingState) -> None:
        """Multiply the weights by the factors without noise, which need not be 0 or 1."""
        active = bool(self.factors)
        super().on_end(state)
        for name, parameter in self.run.units.parameters().items() if active else ():
            parameter.mul_(_clipped(torch.sigmoid(self.scores[name])))


def hard_concrete(score: Tensor, noise: Tensor) -> Tensor:
    """Return a draw of the hard concrete distribution, in [0, 1], given logistic noise (Louizos et al.)."""
    return _clipped(torch.sigmoid((noise + score) / TEMPERATURE))


def chance_of_nonzero(score: Tensor) -> Tensor:
    """Return the probability that a draw is not zero (Louizos et al.)."""
    low, high = STRETCH
    return torch.sigmoid(score - TEMPERATURE * math.log(-low / high))


def _clipped(value: Tensor) -> Tensor:
    low, high = STRETCH
    return (value * (high - low) + low).clamp(0, 1)


METHOD = Method("movement", Recipe(criterion=Movement(), allocation=Uniform(), schedule=OneShot(at=0.5)))
