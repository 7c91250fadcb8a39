"""Edge-popup: no weight is ever trained; what is learned is which of the random weights to use.

Ramanujan, Wortsman, Kembhavi, Farhadi, Rastegari: What's Hidden in a Randomly Weighted Neural Network?, CVPR 2020.
Deviations are on the card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.context import Context
from secateur.core.engine import Run
from secateur.core.hooks import Hooks, TrainingState
from secateur.core.method import Method
from secateur.core.randomness import generator_for, seed_for
from secateur.core.recipe import Recipe
from secateur.core.schedule import OneShot
from secateur.core.slots import Criterion
from secateur.core.units import Kept, Scores
from secateur.parts.allocation.ranking import Uniform


class EdgePopup(Criterion):
    """The size of a score that each weight has and that training moves; the largest of each layer are in use.

    Attributes:
        init: How the weights are drawn. ``signed``: all of a layer have one size, sqrt(2 / fan-in), and random signs.
            ``kaiming``: normal, with that deviation. ``given``: the network's own.
        scaled: Divide the fan-in by the density, since only that share of the inputs is in use.
        lr: Of the scores; falls to zero along a cosine.
        momentum: Of the scores.
        weight_decay: Of the scores.
    """

    name = "edge_popup"
    learns: ClassVar[bool] = True
    from_scratch: ClassVar[bool] = True
    init: Literal["signed", "kaiming", "given"] = "signed"
    scaled: bool = True
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)

    def hooks(self, run: Run) -> Hooks:
        """Return what trains the scores instead of the weights."""
        return Popup(self, run)

    def score(self, context: Context) -> Scores:
        """Return the size of each learned score."""
        assert isinstance(context.learned, Popup)
        return {name: score.abs() for name, score in context.learned.scores.items()}


class Popup(Hooks):
    """Trains scores; the weights are those of the beginning, and masked while the network computes.

    Attributes:
        scores: One per weight.
    """

    def __init__(self, settings: EdgePopup, run: Run) -> None:
        self._settings, self._run = settings, run
        self._generator = generator_for("popup", run.seed)
        self.scores = {name: self._drawn_score(weight) for name, weight in run.units.parameters().items()}
        self._momenta = {name: torch.zeros_like(score) for name, score in self.scores.items()}
        self._weights: dict[str, Tensor] = {}

    def on_start(self, state: TrainingState) -> None:
        """Draw the network, once, and mask it by the scores; mutates the model."""
        if self._run.next_level is None:
            return
        if not self._weights:
            self._draw()
        self._mask()

    def after_backward(self, state: TrainingState) -> None:
        """Let the scores take a step down the straight-through gradient, and let no parameter move."""
        if self._run.next_level is not None:
            self._step(state)
        for parameter in state.model.parameters():
            parameter.grad = None  # optimizers leave alone what has no gradient, weight decay and all

    def after_step(self, state: TrainingState) -> None:
        """Use the weights of the largest scores; mutates the model."""
        if self._run.next_level is not None:
            self._mask()

    @torch.no_grad()
    def on_end(self, state: TrainingState) -> None:
        """Put all weights back as they were drawn; mutates the model."""
        if self._run.next_level is not None:
            for name, weight in self._run.units.parameters().items():
                weight.copy_(self._weights[name])

    def _drawn_score(self, weight: Tensor) -> Tensor:
        """Kaiming-uniform with a = sqrt(5), as the paper's code has it: U(-1, 1) / sqrt(fan-in)."""
        drawn = torch.rand(weight.shape, generator=self._generator).mul_(2).sub_(1)
        return drawn.div_(math.sqrt(weight[0].numel())).to(weight.device)

    @torch.no_grad()
    def _draw(self) -> None:
        run, init = self._run, self._settings.init
        if init != "given":
            with torch.random.fork_rng():
                torch.manual_seed(seed_for("weights", run.seed))
                run.units.redraw()  # biases and normalizations too: nothing of a training may be left
            kept = self._kept()
            for name, weight in run.units.parameters().items():
                drawn = torch.randn(weight.shape, generator=self._generator)
                density = float(kept[name].float().mean()) if self._settings.scaled else 1.0
                fan_in = density * weight[0].numel()
                weight.copy_((drawn.sign() if init == "signed" else drawn) * math.sqrt(2 / fan_in))
        self._weights = {name: weight.detach().clone() for name, weight in run.units.parameters().items()}

    def _kept(self) -> Kept:
        return self._run.choose({name: score.abs() for name, score in self.scores.items()})

    @torch.no_grad()
    def _mask(self) -> None:
        kept = self._kept()
        for name, weight in self._run.units.parameters().items():
            torch.mul(self._weights[name], kept[name], out=weight.data)

    @torch.no_grad()
    def _step(self, state: TrainingState) -> None:
        """One step of SGD with momentum: ds = dL/dw w sign(s), where w is in use or not."""
        settings = self._settings
        lr = settings.lr * 0.5 * (1 + math.cos(math.pi * state.progress))
        for name, weight in self._run.units.parameters().items():
            if weight.grad is None:
                continue
            score, momentum = self.scores[name], self._momenta[name]
            gradient = weight.grad * self._weights[name] * score.sign() + settings.weight_decay * score
            score.sub_(momentum.mul_(settings.momentum).add_(gradient), alpha=lr)

    def state_dict(self) -> dict[str, Any]:
        """Return scores, their momenta, and the weights that are masked meanwhile."""
        return {"scores": self.scores, "momenta": self._momenta, "weights": self._weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with these."""
        self.scores, self._momenta = dict(state["scores"]), dict(state["momenta"])
        self._weights = dict(state["weights"])


METHOD = Method(
    "edge_popup",
    Recipe(criterion=EdgePopup(), allocation=Uniform(), schedule=OneShot(at=0.9)),
)
