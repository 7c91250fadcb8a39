"""Gibbs pruning: masks drawn from a Gibbs distribution that cools down while the network trains.

Labach, Valaee: A Framework for Neural Network Pruning Using Gibbs Distributions, arXiv 2006.04981. Written from the
paper; its reference code (j201/gibbs-pruning) was consulted for hyperparameters and departures.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

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
from secateur.parts.granularity.weight import WeightUnits
from secateur.parts.weight_factors import WeightFactors

Hamiltonian = Literal["weight", "kernel", "filter"]


class Gibbs(Criterion):
    """The mean squared weight of a weight's weight, kernel or filter, after training under masks that were drawn.

    A mask is made of spins x, +1 = keep, with p(x) ~ exp(-beta H(x)) and H = sum of b x - c sum of coupled pairs, where
    b = 1 - w²/Q: Q lies between the mean squared weights of what a cut would keep and what it would remove. As beta
    grows, the mask becomes that cut.

    Attributes:
        hamiltonian: ``weight``: spins are independent. ``kernel``: those of a kernel (of one filter and one input
            channel) are coupled, each with each. ``filter``: those of a filter, one half of the input channels with
            the other half.
        coupling: c, the strength of the coupling.
        beta: Inverse temperatures at the start and at the end of the annealing, which is geometric.
        anneal: Share of the training before the cut that the annealing takes.
        sweeps: Updates of both halves for a filter's mask.
    """

    name = "gibbs"
    learns = True
    hamiltonian: Hamiltonian = "weight"
    coupling: float = Field(0.01, ge=0)
    beta: tuple[float, float] = (0.7, 1e4)
    anneal: float = Field(0.8, gt=0, le=1)
    sweeps: int = Field(50, ge=1)

    def hooks(self, run: Run) -> Hooks:
        """Return what draws masks in training until the cut."""
        return _DrawnMasks(run, self)

    def score(self, context: Context) -> Scores:
        """Return the energies' reference: mean squared weights."""
        return {name: mean_squares(weight, self.hamiltonian) for name, weight in context.weights.items()}


class _DrawnMasks(Hooks):
    """Multiplies the weights by a mask that is drawn anew in each step; gradients reach kept weights only.

    Attributes:
        masks: The present ones.
    """

    def __init__(self, run: Run, settings: Gibbs) -> None:
        if not isinstance(run.units, WeightUnits):
            raise NotApplicable("Gibbs pruning draws masks of single weights: choose granularity='weight'.")
        self.run, self.settings = run, settings
        self.masks: Scores = {}
        self._places = WeightFactors(run.units)
        self._masked = ExitStack()
        self._generator = generator_for("masks", run.seed)

    def on_start(self, state: TrainingState) -> None:
        if self.run.next_level is None:
            return
        self.masks = {name: torch.ones_like(p) for name, p in self.run.units.parameters().items()}
        self._masked.enter_context(self._places.applied(self.masks))
        self._draw(state)

    def after_step(self, state: TrainingState) -> None:
        if self.masks:
            self._draw(state)

    def on_end(self, state: TrainingState) -> None:
        self._masked.close()
        self.masks = {}

    def beta(self, state: TrainingState) -> float:
        """Return the present inverse temperature."""
        hot, cold = self.settings.beta
        return float(hot * (cold / hot) ** min(1.0, state.progress / self.settings.anneal))

    @torch.no_grad()
    def _draw(self, state: TrainingState) -> None:
        level, settings, beta = self.run.next_level, self.settings, self.beta(state)
        assert level is not None
        weights = {name: p.detach() for name, p in self.run.units.parameters().items()}
        means = {name: mean_squares(weight, settings.hamiltonian) for name, weight in weights.items()}
        kept = self.run.choose(means, level.keep)
        for name, weight in weights.items():
            quantile = _between(means[name], kept[name])
            field, start = 1 - weight.square() / quantile, means[name] > quantile
            self.masks[name].copy_(self._drawn(field, start, beta))

    def _drawn(self, field: Tensor, start: Tensor, beta: float) -> Tensor:
        settings = self.settings
        if settings.hamiltonian == "weight":
            return draw_independent(field, beta, self._generator)
        if settings.hamiltonian == "filter":
            return draw_halves(field, start, beta, settings.coupling, settings.sweeps, self._generator)
        kernels = field.flatten(2) if field.dim() > 2 else field[..., None]
        spins = draw_coupled(kernels.flatten(0, 1), beta, settings.coupling, self._generator)
        return spins.view(field.shape)

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        for name, mask in self.masks.items():
            mask.copy_(state["masks"][name])


def mean_squares(weight: Tensor, hamiltonian: Hamiltonian) -> Tensor:
    """Return, for each weight, the mean squared weight of what belongs together: itself, its kernel, or its filter."""
    first = {"weight": weight.dim(), "kernel": 2, "filter": 1}[hamiltonian]
    together = tuple(range(first, weight.dim()))
    squares = weight.square()
    return squares.mean(together, keepdim=True).expand_as(weight) if together else squares


def draw_independent(field: Tensor, beta: float, generator: torch.Generator) -> Tensor:
    """Return a draw of independent spins (True = +1) with H = sum of b x: P(+1) = sigmoid(-2 beta b).

    Args:
        field: b, of any shape.
        beta: Inverse temperature.
        generator: Source of randomness, on the CPU.
    """
    return _uniform(field, generator) < torch.sigmoid(-2 * beta * field)


def draw_coupled(field: Tensor, beta: float, coupling: float, generator: torch.Generator) -> Tensor:
    """Return an exact draw of spins that are coupled each with each: H = sum of b x - c sum over i != j of x_i x_j.

    The energy depends on the couplings through the number k of spins that are up alone, (2k - n)² - n. So the
    partition functions of the first i spins with k of them up (n² numbers) give the chance of each k, and then of each
    spin, from the last to the first. Enumerating the 2^n states gives the same.

    Args:
        field: b, of shape (systems, n).
        beta: Inverse temperature.
        coupling: c.
        generator: Source of randomness, on the CPU.
    """
    up = (-beta * field).double()
    systems, n = up.shape
    table = [torch.full((systems, n + 1), -torch.inf, dtype=torch.float64, device=up.device)]
    table[0][:, 0] = 0
    for i in range(n):
        before = table[-1]
        with_up = torch.cat([torch.full_like(before[:, :1], -torch.inf), before[:, :-1]], 1) + up[:, i : i + 1]
        table.append(torch.logaddexp(before - up[:, i : i + 1], with_up))
    k = torch.arange(n + 1, device=up.device)
    chances = (table[n] + beta * coupling * ((2 * k - n) ** 2 - n)).softmax(1)
    left = (_uniform(chances[:, :1], generator) > chances.cumsum(1)).sum(1, keepdim=True).clamp_max(n)
    spins = torch.zeros_like(up, dtype=torch.bool)
    for i in reversed(range(n)):
        above = table[i].gather(1, (left - 1).clamp_min(0)) + up[:, i : i + 1] - table[i + 1].gather(1, left)
        spin = (left > i) | ((_uniform(above, generator) < above.exp()) & (left > 0))  # no choice where all are up
        spins[:, i : i + 1] = spin
        left = left - spin.long()
    return spins


def draw_halves(
    field: Tensor, start: Tensor, beta: float, coupling: float, sweeps: int, generator: torch.Generator
) -> Tensor:
    """Return a draw by chromatic Gibbs sampling of filters whose two halves are coupled.

    H = sum of b x - c sum over i in one half of the input channels, j in the other, of x_i x_j. Given one half, the
    spins of the other are independent: P(+1) = sigmoid(-2 beta (b - c sum of the other half)).

    Args:
        field: b, of shape (filters, inputs, ...).
        start: The spins at first, of the same shape.
        beta: Inverse temperature.
        coupling: c.
        sweeps: How many times both halves are drawn.
        generator: Source of randomness, on the CPU.
    """
    flat = field.flatten(2) if field.dim() > 2 else field[..., None]
    spins = start.view(flat.shape).to(flat.dtype) * 2 - 1
    middle = flat.shape[1] // 2
    halves = (slice(0, middle), slice(middle, None))
    for _ in range(sweeps):
        for half, other in (halves, halves[::-1]):
            pull = coupling * spins[:, other].sum((1, 2), keepdim=True)
            drawn = draw_independent(flat[:, half] - pull, beta, generator)
            spins[:, half] = drawn.to(flat.dtype) * 2 - 1
    return (spins > 0).view(field.shape)


def _between(means: Tensor, kept: Tensor) -> Tensor:
    """Return a value between the smallest of the kept and the largest of the removed."""
    inside = means.masked_fill(~kept, torch.inf).min()
    outside = means.masked_fill(kept, -torch.inf).max()
    if not bool(inside.isfinite()):
        return outside * 2
    if not bool(outside.isfinite()):
        return inside / 2
    return ((inside + outside) / 2).clamp_min(torch.finfo(means.dtype).tiny)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)


METHOD = Method("gibbs", Recipe(criterion=Gibbs(), allocation=Uniform(), schedule=OneShot(at=0.5)))
