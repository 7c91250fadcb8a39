"""What `prune` and `Pruner` share: from a request to a pruning run, and from the run to its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.budgets import cost_of
from secateur.core import engine
from secateur.core.batches import Data, Loss
from secateur.core.budget import Budget
from secateur.core.method import method as find_method
from secateur.core.recipe import Recipe
from secateur.core.units import Units
from secateur.errors import BudgetUnreachable, InvalidInputs, InvalidRecipe
from secateur.measure.profile import Profile, profile
from secateur.parts.granularity.channel_per_input import GatedUnits
from secateur.parts.granularity.cut import CutUnits
from secateur.parts.granularity.masked import MaskedUnits
from secateur.pruned import Pruned
from secateur.structure.inputs import Inputs, as_inputs
from secateur.structure.plan import Plan
from secateur.training.fabric import share_data
from secateur.training.loop import History

ROUNDING = 1e-9
"""Of a share times a cost."""


@dataclass(frozen=True)
class Job:
    """A request that was checked.

    Attributes:
        recipe: What to do.
        budget: How much may stay.
        inputs: The example inputs.
        seed: Controls every random choice.
        before: What the unpruned network costs.
    """

    recipe: Recipe
    budget: Budget
    inputs: Inputs
    seed: int
    before: Profile

    def start(
        self, model: nn.Module, data: Data | None, loss: Loss | None, checkpoints: engine.Checkpoints | None
    ) -> engine.Run:
        """Return the run that prunes `model`, in place."""
        units = self.recipe.granularity.units(model, self.inputs, self.recipe.scope)
        if not self.recipe.begins_with_a_cut:
            units.prove_analysis()
        return engine.Run(
            self.recipe,
            units,
            self.budget,
            cost_of(self.budget.kind),
            data=None if data is None else share_data(data),
            loss=loss,
            checkpoints=checkpoints,
            seed=self.seed,
        )

    def result(self, run: engine.Run, model: nn.Module, history: History) -> Pruned:
        """Return the result of a finished run; `model` is its network.

        Raises:
            BudgetUnreachable: The network, counted anew, costs more than was allowed.
        """
        units, after = run.units, profile(model, self.inputs)
        self._check_cost(units, after)
        structured = units if isinstance(units, CutUnits) else None
        return Pruned(
            model=model.eval(),
            masks=units.masks if isinstance(units, MaskedUnits) else {},
            structure_plan=_plan(units, model),
            before=self.before,
            after=after,
            recipe=self.recipe,
            budget=self.budget,
            seed=self.seed,
            rounds=tuple(run.rounds),
            history=history,
            structure=structured.dense_structure if structured else None,
            proofs=tuple(structured.proofs) if structured else (),
            inputs=self.inputs,
        )

    def _check_cost(self, units: Units, after: Profile) -> None:
        """Compare what was predicted with what is counted: a network that only should be small is no success."""
        kind = self.budget.kind
        if kind in ("sparsity", "latency_ms") or not isinstance(units, CutUnits | GatedUnits):
            return
        target = self.budget.target(getattr(self.before, kind))
        allowed = target * (1 + self.budget.tolerance)
        found = after.effective_macs if isinstance(units, GatedUnits) else getattr(after, kind)
        if found > allowed * (1 + ROUNDING):
            raise BudgetUnreachable(
                f"The pruned network has {found:,} {kind}, and {allowed:,.0f} are allowed: "
                + self._why_more(units, found / target - 1)
            )

    def _why_more(self, units: Units, excess: float) -> str:
        """Return why a network costs more than was predicted, and what to do."""
        if self.budget.kind == "macs" and isinstance(units, CutUnits) and units.dense_structure.reads_values:
            return (
                "its path depends on values, and so does its cost. Allow for that: "
                f"Budget(macs={self.budget.value:g}, tolerance={_rounded_up(excess)}), or limit the parameters."
            )
        return (
            "some operation costs more than the analysis says. Ask for another kind of budget (params, macs, bytes), "
            "and report this."
        )


def _rounded_up(share: float) -> float:
    """Return a number with two digits that leaves room for a share."""
    return (int(100 * share) + 1) / 100


def _plan(units: Units, model: nn.Module) -> Plan:
    if isinstance(units, CutUnits):
        return units.finish(model)
    return units.plan if isinstance(units, GatedUnits) else Plan()


def make_job(
    model: Any,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    budget: Any,
    method: str | Recipe,
    slots: Mapping[str, Any],
    seed: int,
) -> Job:
    """Return a request, checked.

    Raises:
        InvalidInputs: No model, or inputs that it does not run on.
        InvalidRecipe: An unknown slot or setting, or no budget.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputs(f"Pruning needs a torch.nn.Module, got {type(model).__name__}.")
    if not isinstance(budget, Budget):
        raise InvalidRecipe(f"Pruning needs a Budget, for example Budget(macs=0.5); got {budget!r}.")
    inputs = as_inputs(example_inputs, example_kwargs)
    return Job(_recipe(method, slots), budget, inputs, seed, profile(model, inputs))


def _recipe(method: str | Recipe, slots: Mapping[str, Any]) -> Recipe:
    unknown = slots.keys() - Recipe.model_fields.keys()
    if unknown:
        known = ", ".join(Recipe.model_fields)
        raise InvalidRecipe(f"Pruning got an unknown option {sorted(unknown)[0]!r}. A recipe's slots are: {known}.")
    return (method if isinstance(method, Recipe) else find_method(method)).but(**slots)
