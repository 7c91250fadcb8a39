"""Which runs a benchmark asks for: one for each arm, budget and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.bench.benchmarks import DENSE, SANITY, Benchmark, Control, Ladder, budget_label
from secateur.bench.records import Run
from secateur.core import registry
from secateur.core.budget import Budget
from secateur.core.early_bird import EarlyBird
from secateur.core.method import method
from secateur.core.recipe import FreshAtLast, Recipe
from secateur.errors import UnknownName
from secateur.parts.allocation.shuffled import Shuffled
from secateur.tasks import find_task


def plan(
    benchmark: Benchmark,
    data: str,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Run, ...]:
    """Return the runs that a benchmark asks for: the dense references first, then controls and methods.

    Args:
        benchmark: Which one.
        data: Hash of the splits.
        methods: Methods and controls; default: all that apply.
        budgets: Default: all of the ladders.
        seeds: Default: the benchmark's.

    Raises:
        UnknownName: A method that does not exist, a control or budget that the benchmark does not have.
    """
    arms = (*benchmark.controls, *benchmark.methods())
    checks = tuple(f"{arm}+{check}" for arm in arms for check in SANITY)
    offered = {budget_label(budget): budget for ladder in benchmark.ladders for budget in ladder.budgets}
    chosen = tuple(offered) if budgets is None else tuple(budget_label(budget) for budget in budgets)
    for kind, names, known in (("method", methods or (), (*arms, *checks)), ("budget", chosen, tuple(offered))):
        for name in names:
            if name not in known:
                raise UnknownName(f"{kind} of benchmark {benchmark.name!r}", name, known)
    runs = []
    for seed in seeds if seeds is not None else benchmark.seeds:
        dense = _dense_run(benchmark, data, seed)
        runs.append(dense)
        for ladder in benchmark.ladders:
            for arm in methods or (*arms, *(checks if ladder.sanity else ())):
                recipe = _recipe(benchmark, ladder, arm)
                if recipe is None:
                    continue
                runs += [
                    dense.model_copy(update=_pruning(benchmark, arm, recipe, budget))
                    for budget in ladder.budgets
                    if budget_label(budget) in chosen and (methods or _applies(benchmark, ladder, arm, budget))
                ]
    return tuple(sorted(runs, key=lambda run: run.role != "dense"))


def data_of(benchmark: Benchmark) -> str:
    """Return the hash of the splits, which for data of the user's own is taken now.

    Raises:
        DataUnavailable: The data are not there.
    """
    return benchmark.task.data or find_task(benchmark.task.name).splits.digest()


def dense_run(run: Run) -> Run:
    """Return the run of the dense reference that a run prunes."""
    return run.model_copy(update={**_NO_PRUNING, "role": "dense", "arm": DENSE})


_NO_PRUNING = dict.fromkeys(("method", "recipe", "recipe_hash", "budget", "calibration"))


def _dense_run(benchmark: Benchmark, data: str, seed: int) -> Run:
    return Run(
        benchmark=benchmark.name,
        version=benchmark.version,
        task=benchmark.task.name,
        task_version=benchmark.task.version,
        data=data,
        network=benchmark.network,
        metric=benchmark.metric,
        reference=benchmark.reference,
        training=benchmark.training.model_dump(mode="json", exclude_defaults=True),
        seed=seed,
        role="dense",
        arm=DENSE,
    )


def _applies(benchmark: Benchmark, ladder: Ladder, arm: str, budget: Budget) -> bool:
    """Return whether an arm that nobody asked for is run at a budget; sanity checks are for methods."""
    base, _, check = arm.partition("+")
    return not check or (base not in benchmark.controls and budget in ladder.sanity)


def _pruning(benchmark: Benchmark, arm: str, recipe: Recipe, budget: Budget) -> dict[str, Any]:
    base, _, check = arm.partition("+")
    return {
        "role": "control" if base in benchmark.controls or check else "method",
        "arm": arm,
        "method": benchmark.arm(base).method,
        "recipe": recipe.model_dump(mode="json"),
        "recipe_hash": recipe.hash,
        "budget": budget.model_dump(mode="json", exclude_defaults=True),
        "calibration": benchmark.calibration,
    }


def _recipe(benchmark: Benchmark, ladder: Ladder, arm: str) -> Recipe | None:
    """Return what an arm does on a ladder; None if it does not apply there.

    A network that starts from scratch gets the dense network's training, every other one the ladder's recovery.
    """
    base, _, check = arm.partition("+")
    what = benchmark.arm(base)
    recipe = method(what.method).but(**{**what.slots, "granularity": ladder.granularity})
    if ladder.granularity.name not in (what.granularities or registry.cards()[what.method].granularity):
        return None
    if check == "shuffled":
        recipe = recipe.but(allocation=Shuffled(of=recipe.allocation))
    if check == "fresh":
        recipe = _with_fresh_weights(recipe)
    recovery = ladder.recovery
    if recipe.from_scratch:
        compute = what.compute if isinstance(what, Control) else "epochs"
        recovery = benchmark.training.model_copy(update={"compute": compute})
    return recipe.but(recovery=recovery, scope=ladder.scope)


def _with_fresh_weights(recipe: Recipe) -> Recipe:
    """Return the recipe with new weights under its last mask, which is found as it would be without them."""
    scores_live = recipe.mask_from == "end" or isinstance(recipe.mask_from, EarlyBird)
    if scores_live and len(recipe.schedule.levels(0.5)) > 1:  # weights after a cut have a part in the next one
        return recipe.but(weights_from=FreshAtLast(earlier=recipe.weights_after(last=False)))
    return recipe.but(weights_from="fresh")
