"""``secateur prune RECIPE.yaml``: prunes a network of a task, or the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field

from secateur.cli.common import (
    JsonOption,
    call_for_model,
    check_folder,
    console,
    data_of,
    import_function,
    inputs_for,
    print_json,
    training_progress,
)
from secateur.core.budget import Budget
from secateur.core.engine import Checkpoints
from secateur.core.recipe import Recipe
from secateur.core.slots import Precision
from secateur.core.value import Value
from secateur.errors import InvalidRecipe
from secateur.yaml_file import read_yaml


class RunFile(Value):
    """What a recipe file may say: a network, a budget, and the slots of a recipe.

    Attributes:
        task: A task of secateur; instead of model, data and example.
        network: A network of the task.
        model: ``module:function`` that makes the network, trained; or ``timm:NAME``, ``hf:FOLDER`` ...
        data: ``module:function`` that returns training batches, or a pair (training, validation).
        example: ``module:function`` that returns example inputs, or a shape; networks of libraries have their own.
        loss: ``module:function(output, target)``; default: cross-entropy, or the model's own.
        method: A method's name.
        budget: One of macs, params, sparsity, bytes, latency_ms.
        seed: Controls every random choice.
        precision: Of the recovery: ``32-true``, ``bf16-mixed``, or ``auto``: mixed on hardware that has bfloat16.
        teachers: What makes further teachers for a recovery by distillation, each as for model.
        recipe: Slots that differ from the method's: granularity, recovery, schedule ...
    """

    task: str | None = None
    network: str | None = None
    model: str | None = None
    data: str | None = None
    example: str | tuple[int, ...] | None = None
    loss: str | None = None
    method: str = "magnitude"
    budget: Budget
    seed: int = 0
    precision: Precision = "32-true"
    teachers: tuple[str, ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)


def command(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: network, budget, method, slots.")],
    out: Annotated[Path, typer.Option(help="Folder for the network, the record and the report.")] = Path("pruned"),
    model: Annotated[str | None, typer.Option(help="module:function, instead of the file's model.")] = None,
    data: Annotated[str | None, typer.Option(help="module:function, instead of the file's data.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the file's seed.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prune a network as a recipe file says; writes model.safetensors, record.json and report.html."""
    from secateur.api import prune, save
    from secateur.measure.report import collapse_warning, percentage

    changes = {"model": model, "data": data, "seed": seed}
    run = read_run_file(recipe, {k: v for k, v in changes.items() if v is not None})
    check_folder(out)
    subject = subject_of(run)
    with training_progress(f"{run.method} on {run.network or run.model or run.task}") as on_step:
        pruned = prune(
            subject["model"],
            subject["example"],
            budget=run.budget,
            method=run.method,
            data=subject["train"],
            validation=subject["validation"],
            loss=import_function(run.loss) if run.loss else subject["loss"],
            checkpoints=_early_states(run),
            precision=run.precision,
            teachers=subject["teachers"],
            seed=run.seed,
            on_step=on_step,
            **run.recipe,
        )
    out.mkdir(parents=True, exist_ok=True)
    save(pruned, out / "model.safetensors")
    record = {**pruned.about(), "history": pruned.history, "run": run.model_dump(mode="json", exclude_none=True)}
    if pruned.masks:
        record |= {"effective_sparsity": pruned.effective_sparsity, "collapsed": pruned.collapsed}
    if subject["test"] is not None:
        record["test_accuracy"] = {"before": subject["test"](subject["model"]), "after": subject["test"](pruned.model)}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    pruned.report(out / "report.html", dense=subject["model"], data=subject["validation"] or subject["train"])
    if as_json:
        print_json(record)
        return
    before, after = pruned.before, pruned.after
    console.print(f"MACs        {before.macs:>14,} -> {after.macs:,} ({after.macs / before.macs:.3f})")
    if pruned.structure_plan.gated:
        share = after.effective_macs / before.macs
        console.print(f"per input   {before.macs:>14,} -> {after.effective_macs:,} at most ({share:.3f})")
    console.print(f"parameters  {before.params:>14,} -> {after.params:,} ({after.params / before.params:.3f})")
    if after.params == before.params:
        console.print(f"non-zero    {before.nonzero_params:>14,} -> {after.nonzero_params:,}")
    if pruned.masks and pruned.effective is not None:
        units = sum(pruned.effective.cut_off.values())
        console.print(f"on a path   {'':>14}    {pruned.effective.params:,} ({units} units are cut off)")
        console.print(f"effective sparsity {percentage(pruned.effective_sparsity):>25}")
    if pruned.collapsed:
        console.print(collapse_warning(pruned.collapsed), style="bold red", markup=False)
    if "test_accuracy" in record:
        accuracy = record["test_accuracy"]
        console.print(f"accuracy    {100 * accuracy['before']:>12.2f} % -> {100 * accuracy['after']:.2f} % (test)")
    console.print(f"Wrote {out}/model.safetensors, record.json and report.html.", markup=False)


def _early_states(run: RunFile) -> Checkpoints:
    """Return earlier weights of a task's reference, if the recipe names any; of a user's network nobody knows them."""
    from secateur.core.method import method
    from secateur.tasks import find_task
    from secateur.tasks.reference import early_states, reference_record

    if run.task is None:
        return {}
    task = find_task(run.task)
    network = run.network or task.default_network
    return early_states(task, network, method(run.method).recipe.but(**run.recipe), reference_record(task, network))


def read_run_file(path: Path, changes: dict[str, Any] | None = None) -> RunFile:
    """Return the content of a recipe file.

    Raises:
        InvalidRecipe: The file is missing, is not YAML, or says something unknown.
    """
    content = read_yaml(path, "task or model, budget, method ...")
    run = RunFile(**{**content, **(changes or {})})
    unknown = run.recipe.keys() - Recipe.model_fields.keys()
    if unknown:
        raise InvalidRecipe(
            f"{path}: recipe has no slot {sorted(unknown)[0]!r}; it has {', '.join(Recipe.model_fields)}."
        )
    return run


def subject_of(run: RunFile) -> dict[str, Any]:
    """Return model, example inputs, training and validation batches, test metric and loss if any, and teachers."""
    from secateur.tasks import find_task
    from secateur.tasks.reference import load_reference
    from secateur.tasks.zoo import is_in_zoo

    if (run.task is None) == (run.model is None):
        raise InvalidRecipe("A recipe file names either a task, or a model (module:function) with data and example.")
    if run.task is None and run.network is not None:
        raise InvalidRecipe("A recipe file names a network only beside a task; model makes your own.")
    teachers = [call_for_model(name) for name in run.teachers]
    if run.task is not None:
        own = [name for name in ("data", "example", "loss") if getattr(run, name) is not None]
        if own:
            raise InvalidRecipe(
                f"A task brings its own {own[0]}; remove that line, or name a model instead of the task."
            )
        task = find_task(run.task)
        return {
            "model": load_reference(task, run.network),
            "example": task.example(),
            "train": task.train_batches(run.seed),
            "validation": task.validation_batches(),
            "test": task.test_accuracy,
            "loss": task.loss,
            "teachers": teachers,
        }
    if run.example is None and not is_in_zoo(str(run.model)):
        raise InvalidRecipe("A model needs example: a shape such as [1, 3, 224, 224], or module:function.")
    train, validation = data_of(run.data)
    written = ",".join(map(str, run.example)) if isinstance(run.example, tuple) else run.example
    is_function = written is not None and ":" in written
    model = call_for_model(str(run.model))
    return {
        "model": model,
        "example": inputs_for(str(run.model), model, *((None, written) if is_function else (written, None))),
        "train": train,
        "validation": validation,
        "test": None,
        "loss": None,
        "teachers": teachers,
    }
