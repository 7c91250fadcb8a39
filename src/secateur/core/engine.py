"""The engine: the one loop that every recipe runs through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.batches import Data, Loss
from secateur.core.budget import Budget
from secateur.core.context import Context
from secateur.core.early_bird import EarlyBird, Watch
from secateur.core.hooks import Hooks
from secateur.core.recipe import Recipe
from secateur.core.select import fewest, select
from secateur.core.slots import Level, Repair
from secateur.core.units import Cost, Kept, Scores, Units
from secateur.errors import BudgetUnreachable, InvalidRecipe, MissingCheckpoint, NothingPrunable

Checkpoints = Mapping[str | int, Mapping[str, Tensor]]
"""State dicts of the unpruned model: ``init``, and training steps by number."""

Recover = Callable[["Run", Level, float], None]
"""Called with (the run, the level just reached, where its recovery ends in [0, 1])."""


@dataclass(frozen=True)
class Round:
    """What happened at one pruning moment."""

    keep: float
    """Asked share of the dense cost."""
    cost: float
    """Reached cost."""
    counts: Mapping[str, int]
    """Units left in each group that can shrink further."""
    samples_used: int
    """Samples that the scores took."""


class Run:
    """One pruning run: a recipe on units, one pruning moment after another. `units.model` is the result.

    `run` leads it through a recovery of ours, `secateur.Pruner` through a training loop of the user's.

    Args:
        recipe: What to do.
        units: What can be removed.
        budget: How much may stay.
        cost_of: The cost of the budgeted quantity by kept units.
        data: What the criterion may look at.
        loss: Loss for criteria that need gradients.
        checkpoints: Weights of other moments, for `mask_from` and `weights_from`. Without ``init``, the weights that
            the run begins with are the initial ones if all training comes after that moment, or if both mask and
            weights are to come from ``init``.
        seed: Controls every random choice.

    Attributes:
        levels: All pruning moments.
        rounds: What happened at those that are over.
        scores: Those of the last one, of the units that are left.
        hooks: What the criterion does around training steps, if anything.
        watch: Ends a stretch of training when the mask has settled, if the recipe wants an early bird.
        initial: The weights that the run began with, if they are the recipe's ``init``; else empty.

    Raises:
        NothingPrunable: There is no unit.
        InvalidRecipe: The criterion learns in training, and the schedule cuts before any.
        BudgetUnreachable: The network meets the budget already, or the budget allows less than the smallest network.
        MissingCheckpoint: The recipe asks for weights that are not given.
    """

    def __init__(
        self,
        recipe: Recipe,
        units: Units,
        budget: Budget,
        cost_of: Callable[[Units], Cost],
        *,
        data: Data | None = None,
        loss: Loss | None = None,
        checkpoints: Checkpoints | None = None,
        seed: int = 0,
    ) -> None:
        if not units.shapes:
            raise NothingPrunable(f"No unit of this model may be removed: {_why_nothing(units)}")
        self.recipe, self.units, self.budget, self.seed = recipe, units, budget, seed
        self._cost_of, self._data, self._loss = cost_of, data, loss
        live = units.alive() if recipe.weights_from == "same" else units.counts()
        self._costed: tuple[Mapping[str, torch.Size], Cost] = (dict(units.shapes), cost_of(units))
        self._dense, self._target = _target(units, live, budget, self._cost)
        self.levels = recipe.schedule.levels(self._target / self._dense)
        wanted = recipe.checkpoints
        begins = _begins_at_init(recipe, self.levels) and "init" in wanted - (checkpoints or {}).keys()
        self.initial = _copied_state(units) if begins else {}
        self._checkpoints = checkpoints or {}
        for key in wanted:
            self._checkpoint(key)
        self.rounds: list[Round] = []
        self.scores: Scores = {}
        if recipe.criterion.learns and self.levels[0].at == 0:
            raise InvalidRecipe(
                f"{recipe.criterion.name!r} learns while the network trains, so the first cut must come later: give a "
                "schedule that begins after 0, for example {'name': 'one-shot', 'at': 0.5}."
            )
        if recipe.allocation.revives and len(self.levels) > 1 and recipe.weights_from == "same":
            raise InvalidRecipe(
                f"The allocation {recipe.allocation.name!r} brings back units that earlier cuts have set to zero. Take "
                "weights_from='init' or 'fresh', or a schedule with one cut."
            )
        if isinstance(recipe.mask_from, EarlyBird) and self.levels[-1].at == 0:
            raise InvalidRecipe(
                "An early bird is a mask that settles in training, and all cuts of this schedule come before any: give "
                "one that cuts later, for example {'name': 'one-shot', 'at': 0.5}."
            )
        self.hooks: Hooks | None = recipe.criterion.hooks(self)
        early = recipe.mask_from
        self.watch: Watch | None = Watch(early, self._preview) if isinstance(early, EarlyBird) else None

    @property
    def _cost(self) -> Cost:
        """The cost of the budgeted quantity, worked out anew when the listed units have changed."""
        shapes = dict(self.units.shapes)
        if self._costed[0] != shapes:
            self._costed = (shapes, self._cost_of(self.units))
        return self._costed[1]

    @property
    def around_steps(self) -> tuple[Hooks, ...]:
        """All that is to be called around training steps."""
        return tuple(hooks for hooks in (self.hooks, self.watch) if hooks is not None)

    @property
    def next_level(self) -> Level | None:
        """The pruning moment that comes next; None after the last one."""
        return self.levels[len(self.rounds)] if len(self.rounds) < len(self.levels) else None

    def prune(self) -> Round:
        """Carry out the next pruning moment: score, select, remove, set weights back if the recipe says so, repair."""
        recipe, units, level = self.recipe, self.units, self.levels[len(self.rounds)]
        context = self._context(level)
        with self._weights_of(recipe.mask_from):
            self.scores = self._averaged(recipe.criterion.score(context))
        self._cut(context, self._priorities(self.scores), self._allowed(level))
        source = recipe.weights_after(last=level is self.levels[-1])
        if source == "fresh":
            units.redraw()
        elif source != "same":
            units.reset(self._checkpoint(source))
        recipe.repair.after_cut(context)
        counts = units.counts()
        self.rounds.append(Round(level.keep, self._cost(counts), counts, context.samples_used))
        return self.rounds[-1]

    def _preview(self) -> Kept | None:
        """Return the units that the next cut would keep now; None after the last one."""
        level = self.next_level
        return None if level is None else self.choose(self.recipe.criterion.score(self._context(level)), level.keep)

    def choose(self, scores: Scores, keep: float | None = None) -> Kept:
        """Return the units that a cut by these scores would keep now; nothing is cut.

        Args:
            scores: One per unit; higher = keep.
            keep: Share of the dense cost that may stay; default: what the budget allows in the end.
        """
        allowed = self._target if keep is None else max(keep * self._dense, self._target)
        return select(self._priorities(scores), self._cost, allowed, self.units.limits, self.budget.tolerance)

    def _averaged(self, scores: Scores) -> Scores:
        """Return the running average of the scores over the pruning moments, if the schedule asks for one."""
        m, earlier = self.recipe.schedule.momentum, self.scores
        return {g: m * earlier[g] + (1 - m) * new if m and g in earlier else new for g, new in scores.items()}

    def _context(self, level: Level) -> Context:
        seed = 1000 * self.seed + len(self.rounds)
        return Context(self.units, self._data, self._loss, seed, self.hooks, level.keep, self.choose)

    @contextmanager
    def _weights_of(self, source: str | int | EarlyBird) -> Iterator[None]:
        """Score on the weights of another moment; the live ones come back afterwards."""
        if source == "end" or isinstance(source, EarlyBird):
            yield
            return
        live = _copied_state(self.units)
        try:
            self.units.reset(self._checkpoint(source))
            yield
        finally:
            self.units.model.load_state_dict(live)

    def _checkpoint(self, key: str | int) -> Mapping[str, Tensor]:
        if key in self._checkpoints:
            return self._checkpoints[key]
        if key == "init" and self.initial:
            return self.initial
        have = ", ".join(map(repr, self._checkpoints)) or "none"
        raise MissingCheckpoint(
            f"The recipe takes weights of the checkpoint {key!r}; given: {have}. "
            "Pass checkpoints={key: state_dict} with the unpruned model's state at that moment."
        )

    def _priorities(self, scores: Scores) -> Scores:
        """Return what the allocation makes of the scores; units that are gone come last, within their group too."""
        self.units.check(scores)
        priorities = self.recipe.allocation.rank(self._without_gone(scores))
        self.units.check(priorities)
        return self._without_gone(priorities)

    def _without_gone(self, scores: Scores) -> Scores:
        gone = self.units.removed()
        return {g: s.masked_fill(gone[g].to(s.device), -torch.inf) if g in gone else s for g, s in scores.items()}

    def _allowed(self, level: Level) -> float:
        return self._target if level is self.levels[-1] else level.keep * self._dense

    def _selected(self, priorities: Scores, allowed: float) -> Kept:
        """Return what a cut keeps; the allocation has the last word about the last one."""
        kept = select(priorities, self._cost, allowed, self.units.limits, self.budget.tolerance)
        return self.recipe.allocation.settle(kept) if self.next_level is self.levels[-1] else kept

    def _cut(self, context: Context, priorities: Scores, allowed: float) -> None:
        """Remove the worst units; when some groups turn out not to be removable, choose again among the others."""
        units = self.units
        while not self._keep(context, self._selected(priorities, allowed)):
            priorities = {group: values for group, values in priorities.items() if group in units.shapes}
            if not priorities:
                raise NothingPrunable(
                    "No cut of this model could be proved equal to the masked network; none was made: "
                    + _why_nothing(units)
                )
            _check_reachable(units, self.budget, self._cost, self._target, self._dense)

    def _keep(self, context: Context, kept: Kept) -> bool:
        """Repair what stays and remove all other units; if that is impossible, everything is as before."""
        repair, units = self.recipe.repair, self.units
        repairs = type(repair) is not Repair
        before = _copied_state(units) if repairs else {}
        repair.before_cut(context, kept)
        scores_left = units.remaining(self.scores, kept)
        if units.keep(kept):
            self.scores = scores_left
            return True
        if repairs:
            units.model.load_state_dict(before)
        return False


def run(pruning: Run, recover: Recover) -> list[Round]:
    """Lead `pruning` through all of its moments, with a recovery after each, and return what happened."""
    levels = pruning.levels
    if levels[0].at > 0:
        recover(pruning, Level(0.0, 1.0), levels[0].at)
    for level, until in zip(levels, [*(level.at for level in levels[1:]), 1.0], strict=True):
        pruning.prune()
        if until > level.at:
            recover(pruning, level, until)
    return pruning.rounds


def _target(units: Units, live: Mapping[str, int], budget: Budget, cost: Cost) -> tuple[float, float]:
    """Return the cost of the unpruned network and the allowed cost, after checking that it can be met."""
    dense, present = cost(units.counts()), cost(live)
    target = budget.target(dense)
    if target >= present:
        raise BudgetUnreachable(
            f"The network already meets the budget of {budget}: it costs {present:,.6g} of {target:,.6g} allowed, so "
            "that nothing would be removed. Ask for less."
        )
    _check_reachable(units, budget, cost, target, dense)
    return dense, target


def _why_nothing(units: Units) -> str:
    listed = "; ".join(units.obstacles()[:4]) or "it has no parameters"
    return f"{listed}. `secateur inspect` lists every axis with its reason."


def _check_reachable(units: Units, budget: Budget, cost: Cost, target: float, dense: float) -> None:
    """Check that what may be removed is enough.

    Raises:
        BudgetUnreachable: It is not; names the nearest budget.
    """
    least = fewest(units.counts(), units.limits)
    if units.one_must_stay and not any(least.values()):
        least[min(least, key=lambda group: cost({**least, group: 1}))] = 1
    smallest = cost(least)
    if smallest > target * (1 + budget.tolerance):
        raise BudgetUnreachable(
            f"The budget of {budget} cannot be met: the smallest network that can be reached costs {smallest:,.6g} of "
            f"the {dense:,.6g} before. Ask for Budget({budget.nearest(smallest, dense)}), widen the scope, or lower "
            "the granularity's minimum or round_to."
        )


def _begins_at_init(recipe: Recipe, levels: Sequence[Level]) -> bool:
    """Return whether the network that a run begins with can be taken for the untrained one.

    It can if all training comes after the beginning, or if the recipe wants nothing of a trained network. Otherwise the
    given network is a trained one, and rewinding it to itself would do nothing.
    """
    return levels[0].at > 0 or (recipe.mask_from == "init" and recipe.weights_after(last=False) == "init")


def _copied_state(units: Units) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in units.model.state_dict().items()}
