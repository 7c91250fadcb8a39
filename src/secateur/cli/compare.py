"""``secateur compare RECIPE.yaml``: several methods on one network, and which one to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as RichTable

from secateur.atomic import written_atomically
from secateur.cli.common import JsonOption, check_folder, console, import_function, print_json, progress_bar
from secateur.cli.prune import read_run_file, subject_of
from secateur.errors import DataNeeded


def command(
    recipe: Annotated[Path, typer.Argument(help="A YAML file as for `secateur prune`; its method is not looked at.")],
    methods: Annotated[str | None, typer.Option(help="With commas; default: all for trained networks.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    engine: Annotated[str, typer.Option(help="Smaller networks are timed in: eager, onnxruntime, openvino.")] = "eager",
    out: Annotated[Path, typer.Option(help="Folder for the best network, the figures and the report.")] = Path(
        "comparison"
    ),
    as_json: JsonOption = False,
) -> None:
    """Prune a network by several methods with the same budget and recovery, and recommend one."""
    from secateur.api import save
    from secateur.bench.compare import compare
    from secateur.core.hooks import TrainingState

    run = read_run_file(recipe)
    check_folder(out)
    subject = subject_of(run)
    if subject["validation"] is None:
        raise DataNeeded("A comparison needs data to compare on: let the file's data return (training, validation).")
    with progress_bar() as progress:
        bar = progress.add_task("starting", total=None, note="")

        def on_run(method: str, seed: int):  # type: ignore[no-untyped-def]
            def on_step(state: TrainingState) -> None:
                progress.update(bar, total=state.last_step, completed=state.step, note=f"loss {state.loss:.3f}")

            progress.update(bar, description=f"{method} (seed {seed})", total=None)
            return on_step

        found = compare(
            subject["model"],
            subject["example"],
            budget=run.budget,
            data=subject["train"],
            validation=subject["validation"],
            methods=methods.split(",") if methods else None,
            seeds=range(seeds),
            loss=import_function(run.loss) if run.loss else subject["loss"],
            precision=run.precision,
            teachers=subject["teachers"],
            engine=engine,
            on_run=on_run,
            **run.recipe,
        )
    assert found.best.pruned is not None
    out.mkdir(parents=True, exist_ok=True)
    save(found.best.pruned, out / "model.safetensors")
    found.report(out / "report.html")
    with written_atomically(out / "comparison.json") as temporary:
        temporary.write_text(json.dumps(found.as_dict(), indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(found.as_dict())
        return
    content = found.table()
    table = RichTable(*content.head, box=None, pad_edge=False)
    for row in content.rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"\n{found.recommendation}\n", highlight=False)
    if found.warning:
        console.print(found.warning, style="bold red", markup=False)
    console.print(f"Wrote {out}/model.safetensors, comparison.json and report.html.", markup=False)
