"""`Pruner`: prunes a network inside a training loop of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from secateur.core import engine
from secateur.core.batches import Data, Loss
from secateur.core.budget import Budget
from secateur.core.learning import Learning
from secateur.core.masks import Masks
from secateur.core.randomness import seed_for
from secateur.core.recipe import Recipe
from secateur.core.slots import Recovery
from secateur.errors import BudgetUnreachable, InvalidInputs, InvalidRecipe, NotApplicable, PlanMismatch
from secateur.job import Job, make_job
from secateur.parts.granularity.channel_per_input import ChannelPerInput, GatedUnits
from secateur.parts.granularity.cut import CutUnits
from secateur.parts.granularity.masked import MaskedUnits
from secateur.parts.recovery.distill import Distill
from secateur.pruned import Pruned
from secateur.structure.carry import Companions
from secateur.structure.inputs import state_of
from secateur.structure.plan import parse_plan
from secateur.structure.surgery import copied
from secateur.training.teacher import Teacher, Teachers, make_teacher


class Pruner:
    """Prunes a network while the user trains it.

    Call `step` after each ``optimizer.step()``. At the moments of the recipe's schedule it prunes, **in place**: the
    model, its modules and the optimizers stay the same objects, so that everything that holds them goes on (learning
    rate schedulers, gradient scalers, your own variables). After a physical cut the model's parameters are new
    tensors; the optimizers hold the new ones, and what they remember is cut along, as are pending gradients. Single
    weights are zeroed and held at zero after every optimizer step.

    Some methods learn while you train. Those that have a term of the loss need it added to yours:
    ``(loss + pruner.loss_term()).backward()``; `step` says so if you forget. `teacher` lets the unpruned network teach.

    What must be made anew after a cut: a ``DistributedDataParallel`` around the model, and hooks on parameters.

    Args:
        model: The module to train and prune; is changed in place.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        optimizers: The optimizer, or several, that train the model.
        total_steps: Number of `step` calls over which the schedule runs; your loop is the recovery.
        budget: How much may stay.
        method: Name of a method (see `methods`), or a whole recipe.
        data: Batches for the scores, iterable more than once; needed by methods that look at data.
        loss: (output, target) -> scalar, for the scores; default: the model's own for mappings, else cross-entropy.
        copies: Networks to prune along, with weights of their own: ``AveragedModel``, deep copies, EMA.
        example_kwargs: Further keyword arguments of the example call.
        checkpoints: State dicts of the unpruned model at other moments: ``"init"``, or training steps; see `prune`.
        seed: Controls every random choice of the pruning; the random state of the training is not touched.
        **slots: Other answers to a recipe's questions, as for `prune`; not recovery.

    Attributes:
        model: The module that was given.
        steps: Number of `step` calls so far.

    Raises:
        InvalidRecipe: An unknown slot or setting, or a recipe with a recovery of its own.
        InvalidInputs: The model does not run on the inputs, is wrapped, or an optimizer does not train it.
        BudgetUnreachable: The budget cannot be met; says what can.
        NothingPrunable: No unit may be removed.
        PlanMismatch: A copy is not like the model.
        NotApplicable: Copies, where channels are chosen for each input.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = Pruner(net, torch.zeros(1, 8), optimizers=sgd, total_steps=8, budget=Budget(macs=0.5),
        ...                 granularity="channel", schedule={"name": "iterative", "steps": 2})
        >>> for _ in range(8):
        ...     sgd.zero_grad()
        ...     net(torch.randn(16, 8)).square().mean().backward()
        ...     sgd.step()
        ...     _ = pruner.step()
        >>> net[0].out_features, pruner.done
        (16, True)
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        optimizers: Optimizer | Sequence[Optimizer],
        total_steps: int,
        budget: Budget,
        method: str | Recipe = "magnitude",
        data: Data | None = None,
        loss: Loss | None = None,
        copies: nn.Module | Sequence[nn.Module] = (),
        example_kwargs: Mapping[str, Any] | None = None,
        checkpoints: engine.Checkpoints | None = None,
        seed: int = 0,
        **slots: Any,
    ) -> None:
        _check_unwrapped(model)
        self.model, self.steps, self.total_steps = model, 0, _checked_steps(total_steps)
        self._job = make_job(model, example_inputs, example_kwargs, budget, method, slots, seed)
        _check_recovery(self._job)
        self._companions = Companions(_checked_optimizers(optimizers, model), _checked_copies(copies, model))
        _check_copies_can_follow(self._job, self._companions)
        self._mask_handles: list[RemovableHandle] = []
        self._teachers: list[Teacher] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed_for("prune", seed))
            self._run = self._job.start(model, data, loss, checkpoints)
        if isinstance(self._run.units, CutUnits):
            self._run.units.companions = self._companions
        self._learning = Learning(self._run, self._companions.optimizers, total_steps)
        self._learning.start(0)

    @property
    def rounds(self) -> tuple[engine.Round, ...]:
        """What happened at the pruning moments so far."""
        return tuple(self._run.rounds)

    @property
    def done(self) -> bool:
        """Whether the last pruning moment is over, so that the budget is met."""
        return self._run.next_level is None

    def loss_term(self) -> Tensor:
        """Return what the method adds to the loss of this batch: a scalar, 0 if it adds nothing."""
        return self._learning.loss_term()

    def step(self) -> engine.Round | None:
        """Count one training step, and prune if the schedule says so; mutates model, optimizers and copies.

        A moment at the share ``at`` of the schedule comes with the first call that makes ``steps >= at * total_steps``;
        the moment at 0 comes with the first call. With ``mask_from="early-bird"`` it comes with the first call after
        which the mask has settled, if that is earlier.

        Returns:
            What happened, if it was a pruning moment; None otherwise.

        Raises:
            InvalidRecipe: The method has a term of the loss, and it was not asked for since the last step.
        """
        self.steps += 1
        self._learning.step(self.steps)
        happened = None
        while (level := self._run.next_level) is not None and (
            self.steps >= level.at * self.total_steps or self._learning.settled
        ):
            self._learning.end()
            with torch.random.fork_rng():
                torch.manual_seed(seed_for(f"prune at step {self.steps}", self._job.seed))
                happened = self._run.prune()
            if self._job.recipe.weights_after(last=self._run.next_level is None) != "same":
                self._restart_companions()
            self._inform_teachers()
            self._hold_masks()
            self._learning.start(self.steps)
        if self.steps == self.total_steps:
            self._learning.end()
        return happened

    def teacher(
        self, parent: nn.Module, recovery: str | Mapping[str, Any] | Distill = "distill", others: Teachers = ()
    ) -> Teacher:
        """Return a teacher for your loop, whose ``loss(batch)`` takes the place of forward pass and loss.

        It knows of later cuts of this pruner, so that features are compared with those of the parent's units that are
        left. Epochs, optimizer and learning rate of the recovery are not looked at: your loop has its own.

        Args:
            parent: The unpruned network; take a copy before the first cut. It is never changed.
            recovery: What is learned from it: ``"distill"`` with its settings.
            others: Networks, or state dicts of networks like the parent, that teach beside it.

        Raises:
            InvalidRecipe: Another recovery.
            PlanMismatch: The parent is not like the unpruned network.

        Example:
            >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
            >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
            >>> pruner = Pruner(net, torch.zeros(1, 8), optimizers=sgd, total_steps=8, budget=Budget(macs=0.5),
            ...                 granularity="channel")
            >>> teacher = pruner.teacher(copied(net), {"name": "distill", "alpha": 1, "features": 0.1})
            >>> for _ in range(8):
            ...     sgd.zero_grad()
            ...     teacher.loss(torch.randn(16, 8)).backward()
            ...     sgd.step()
            ...     _ = pruner.step()
        """
        settings = Recovery.parse(recovery)
        if not isinstance(settings, Distill):
            raise InvalidRecipe(f"The recovery {settings.name!r} learns from no teacher: take 'distill'.")
        self._teachers.append(make_teacher(settings, self._run.units, parent, others))
        return self._teachers[-1]

    def result(self) -> Pruned:
        """Return the network as it is now, a copy, with everything that `save` and a report need.

        Raises:
            BudgetUnreachable: The schedule is not over, so that less is pruned than was asked for.
        """
        if not self.done:
            raise BudgetUnreachable(
                f"The pruning is not finished: {len(self.rounds)} of {len(self._run.levels)} pruning moments are over "
                f"after {self.steps} of {self.total_steps} steps. Call step() after every optimizer step, or give the "
                "number of steps that the training really has as total_steps."
            )
        return self._job.result(self._run, copied(self.model), [])

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the state of model, optimizers and copies; safe to load as weights."""
        units = self._run.units
        return {
            "recipe": self._job.recipe.hash,
            "steps": self.steps,
            "rounds": [asdict(done) for done in self.rounds],
            "plan": units.plan.model_dump(mode="json") if isinstance(units, CutUnits | GatedUnits) else None,
            "masks": dict(units.masks) if isinstance(units, MaskedUnits) else {},
            "scores": dict(self._run.scores),
            "init": self._run.initial,
            "learned": [hooks.state_dict() for hooks in self._run.around_steps],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Prune the unpruned model, its optimizers and copies as in a checkpoint; load their own states afterwards.

        Raises:
            PlanMismatch: The checkpoint is of another recipe or model, or something was pruned here already.
        """
        units = self._run.units
        if self.rounds or state["recipe"] != self._job.recipe.hash:
            raise PlanMismatch(
                "This state is of another recipe, or this pruner has pruned already. Make the unpruned model, its "
                "optimizers and a Pruner with the same settings, then load."
            )
        kept: dict[str, Tensor] = {}
        if state["rounds"] and isinstance(units, CutUnits | GatedUnits):
            kept = units.kept_in(parse_plan(state["plan"]))
        elif isinstance(units, MaskedUnits):
            kept = units.kept_in(state["masks"])
        if state["rounds"] and ({g: m.shape for g, m in kept.items()} != dict(units.shapes) or not units.keep(kept)):
            raise PlanMismatch("This state is of another model: its units are not those of this one.")
        self.steps = state["steps"]
        self._run.initial = dict(state["init"])
        self._run.rounds[:] = [engine.Round(**done) for done in state["rounds"]]
        self._run.scores = dict(state["scores"])
        self._hold_masks()
        self._inform_teachers()
        self._learning.end()
        self._learning.start(self.steps)
        for hooks, learned in zip(self._run.around_steps, state["learned"], strict=True):
            hooks.load_state_dict(learned)

    def _hold_masks(self) -> None:
        """Zero the masked weights now and after every optimizer step."""
        units = self._run.units
        if not isinstance(units, MaskedUnits) or not units.masks:
            return
        for handle in self._mask_handles:
            handle.remove()
        masks = Masks(self.model, units.masks)
        self._mask_handles = [masks.attach(optimizer) for optimizer in self._companions.optimizers]
        for follower in self._companions.copies:
            Masks(follower, units.masks).apply()

    def _inform_teachers(self) -> None:
        if isinstance(self._run.units, CutUnits):
            for teacher in self._teachers:
                teacher.follow(self._run.units.plan)

    def _restart_companions(self) -> None:
        """The weights were set back: what was remembered of those before is of no use."""
        self._companions.forget()
        for follower in self._companions.copies:
            follower.load_state_dict(self.model.state_dict())


def _check_unwrapped(model: Any) -> None:
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise InvalidInputs(
            f"{type(model).__name__} keeps lists of the parameters that there were when it was made. Give the Pruner "
            "the module inside (model.module), and wrap that again whenever step() returns something."
        )


def _checked_steps(total_steps: int) -> int:
    if total_steps < 1:
        raise InvalidRecipe(f"total_steps is the number of steps of the training, at least 1; got {total_steps}.")
    return total_steps


def _check_recovery(job: Job) -> None:
    if job.recipe.recovery.epochs:
        raise InvalidRecipe(
            f"A Pruner trains nothing: your own loop is the recovery. The recipe has {job.recipe.recovery.name!r}; "
            "pass recovery='none'. (Pruner.teacher distills in your loop.)"
        )


def _check_copies_can_follow(job: Job, companions: Companions) -> None:
    if companions.copies and isinstance(job.recipe.granularity, ChannelPerInput):
        raise NotApplicable(
            "Copies of the model cannot follow it where channels are chosen for each input: gates are trained, too. "
            "Make copies from the model once the Pruner was made, and do not pass them."
        )


def _checked_optimizers(optimizers: Optimizer | Sequence[Optimizer], model: nn.Module) -> tuple[Optimizer, ...]:
    several = tuple(optimizers) if isinstance(optimizers, Sequence) else (optimizers,)
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in several:
        if not isinstance(optimizer, Optimizer):
            raise InvalidInputs(f"optimizers must be torch.optim optimizers; got {type(optimizer).__name__}.")
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise InvalidInputs(
                f"This {type(optimizer).__name__} holds no parameter of the model. Make it from model.parameters()."
            )
    if not several:
        raise InvalidInputs("A Pruner needs the optimizers that train the model, so that they follow; got none.")
    return several


def _checked_copies(copies: nn.Module | Sequence[nn.Module], model: nn.Module) -> tuple[nn.Module, ...]:
    several = (copies,) if isinstance(copies, nn.Module) else tuple(copies)
    inside = tuple(c.module if isinstance(c, AveragedModel) else c for c in several)
    expected = {name: tensor.shape for name, tensor in state_of(model).items()}
    for follower in inside:
        if {name: tensor.shape for name, tensor in state_of(follower).items()} != expected:
            raise PlanMismatch(
                f"A copy ({type(follower).__name__}) does not have the parameters and buffers of the model, so it "
                "cannot be pruned along. Pass deep copies of the model, or AveragedModel."
            )
    return inside
