"""Recovery during a pruning run: trains the network between and after the pruning moments."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.core.batches import Data, Loss
from secateur.core.early_bird import EarlyBird
from secateur.core.engine import Run
from secateur.core.masks import Masks
from secateur.core.slots import Level, Precision
from secateur.errors import DataNeeded, InvalidRecipe
from secateur.measure.profile import count_macs
from secateur.parts.granularity.cut import CutUnits
from secateur.parts.granularity.masked import MaskedUnits
from secateur.parts.recovery.distill import Distill
from secateur.parts.recovery.fine_tune import FineTune
from secateur.structure.carry import Companions
from secateur.training.loop import Evaluate, History, OnStep, Trainer, epoch_length
from secateur.training.teacher import Teacher, Teachers, make_teacher


class Recoverer:
    """What the engine calls after each pruning moment; does nothing if the recipe has no recovery.

    Attributes:
        history: One entry per epoch of all stretches.
    """

    def __init__(
        self,
        run: Run,
        dense: nn.Module,
        example_inputs: Any,
        data: Data | None,
        *,
        loss: Loss | None = None,
        evaluate: Evaluate | None = None,
        on_step: OnStep | None = None,
        precision: Precision = "32-true",
        teachers: Teachers = (),
    ) -> None:
        self.history: History = []
        recipe = self._recipe = run.recipe
        self._dense, self._inputs, self._data = dense, example_inputs, data
        self._loss, self._evaluate, self._on_step, self._precision = loss, evaluate, on_step, precision
        self._trainer: Trainer | None = None
        self._step = 0
        if recipe.recovery.epochs and data is None:
            raise DataNeeded(f"The recovery {recipe.recovery.name!r} trains the network: pass data=.")
        self._teacher: Teacher | None = None
        if isinstance(recipe.recovery, Distill):
            self._teacher = make_teacher(recipe.recovery, run.units, dense, teachers)
        elif isinstance(teachers, nn.Module) or len(teachers):
            raise InvalidRecipe(
                f"There are teachers, and the recovery {recipe.recovery.name!r} learns from none: take 'distill'."
            )
        early = isinstance(recipe.mask_from, EarlyBird)
        trains = early or recipe.criterion.learns or recipe.criterion.works_in_training
        if trains and not recipe.recovery.epochs:
            what = "early-bird" if early else recipe.criterion.name
            raise InvalidRecipe(
                f"{what!r} works while the network trains, and this recipe trains nothing: give a recovery, for "
                "example recovery={'name': 'fine-tune', 'epochs': 5}."
            )

    def __call__(self, run: Run, level: Level, until: float) -> None:
        """Train for this level's share of the recovery."""
        settings = self._recipe.recovery
        if not isinstance(settings, FineTune) or self._data is None:
            return
        total = self.total_steps(run.units.model, settings)
        first = self._step
        last = first + round(until * total) - round(level.at * total)
        trainer = self._trainer_of(run, settings)
        # A network that has become smaller may train for more steps: where this stretch lies is a matter of shares.
        begin = first - level.at * total
        span = (first, last) if self._recipe.schedule.restarts else (begin, begin + total)
        history = trainer.run(self._data, first, last, lr_span=span, evaluate=self._evaluate, on_step=self._on_step)
        self._step = round(history[-1]["step"]) if history else last
        self.history += history

    def total_steps(self, model: nn.Module, settings: FineTune) -> int:
        """Return the number of optimizer steps of the whole recovery for a network of this size."""
        assert self._data is not None
        steps = settings.epochs * self._recipe.schedule.repeats * epoch_length(self._data)
        if settings.compute == "dense epochs":
            steps *= count_macs(self._dense, self._inputs).total / count_macs(model, self._inputs).total
        return max(1, round(steps))

    def _trainer_of(self, run: Run, settings: FineTune) -> Trainer:
        """Return the trainer, whose momentum is carried over cuts; a new one if the weights were set back."""
        units = run.units
        # old momentum has nothing to do with weights that a cut has set back
        rewound = self._recipe.weights_after(last=run.next_level is None) != "same"
        if self._trainer is None or rewound:
            self._trainer = Trainer(
                units.model,
                settings,
                loss=self._loss,
                teacher=self._teacher,
                hooks=run.around_steps,
                precision=self._precision,
            )
            if isinstance(units, CutUnits):
                units.companions = Companions((self._trainer.optimizer,))
        else:
            self._trainer.wrap()
        if isinstance(units, MaskedUnits):
            self._trainer.mask(Masks(units.model, units.masks))
        if self._teacher is not None and isinstance(units, CutUnits):
            self._teacher.follow(units.plan)
        return self._trainer
