"""``secateur demo``: the whole of it on a real network, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as RichTable

from secateur.cli.common import JsonOption, console, print_json, progress_bar


def command(
    task: Annotated[str, typer.Option(help="digits (needs nothing) or fashion-mnist.")] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the networks, the record and the report.")] = Path(
        "secateur-demo"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each row of the table.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Prune a trained network to 30 % of its MACs, beside random pruning and training from scratch."""
    from secateur.bench.demo import run_demo
    from secateur.bench.demo_report import LEGEND, headline_of, table_of, verdict_of, write_demo_page
    from secateur.tasks import find_task

    find_task(task)  # an unknown task is an error before anything starts
    with progress_bar() as progress:
        bar = progress.add_task("starting", total=None, note="")
        record = run_demo(
            task,
            out,
            seeds,
            lambda what, done, total: progress.update(bar, description=what, completed=done, total=total),
        )
    write_demo_page(record, out / "report.html")
    if as_json:
        print_json(record)
        return
    content = table_of(record)
    table = RichTable(box=None, pad_edge=False, title=None)
    for i, heading in enumerate(content.head):
        table.add_column(heading, justify="left" if i == 0 else "right")
    for i, row in enumerate(content.rows):
        table.add_row(*row, style="bold" if i == content.strong else "")
    console.print(table)
    n = record["rows"]["taylor"]["test_accuracy"]["n"]
    console.print(f"\n{headline_of(record)}.\n{verdict_of(record)}\n", highlight=False)
    console.print(
        f"{LEGEND} ± is the 95 % interval over {n} seeds. Everything above was measured in this run, "
        f"which took {record['seconds']:.0f} s.\n"
        f"Wrote {out}/: taylor.safetensors, taylor.onnx, record.json, report.html.",
        style="dim",
        highlight=False,
    )
