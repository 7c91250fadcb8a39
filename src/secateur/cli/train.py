"""``secateur train``: trains a reference network of a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.common import JsonOption, console, print_json, training_progress


def command(
    task: Annotated[str, typer.Argument(help="digits or fashion-mnist.")],
    network: Annotated[
        str | None, typer.Option(help="For example resnet8, resnet20, vit; default: the task's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: TASK-NETWORK.safetensors.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data; default: the task's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate; default: the task's.")] = None,
    seed: Annotated[int, typer.Option(help="Controls weights, order and augmentation.")] = 0,
    resume: Annotated[
        Path | None, typer.Option(help="Checkpoint to go on from, written at the end of each epoch.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network of a task; writes its weights as .safetensors and the record of its training as .json."""
    from secateur.parts.recovery.fine_tune import FineTune
    from secateur.tasks import find_task
    from secateur.tasks.reference import save_reference, train_reference

    chosen = find_task(task)
    network = network or chosen.default_network
    changes = {name: value for name, value in (("epochs", epochs), ("lr", lr)) if value is not None}
    settings = FineTune.parse({**chosen.training_of(network).model_dump(), **changes})
    with training_progress(f"training {network} on {task}") as on_step:
        model, record = train_reference(
            chosen, network, seed=seed, settings=settings, checkpoint=resume, on_step=on_step
        )
    path = out or Path(f"{task}-{network}.safetensors")
    save_reference(model, record, path)
    if as_json:
        print_json(record)
    else:
        console.print(
            f"{network} on {task}: test accuracy {100 * record['test_accuracy']:.2f} % after {settings.epochs:g} "
            f"epochs in {record['seconds']:.0f} s. Wrote {path} and {path.with_suffix('.json').name}.",
            markup=False,
        )
