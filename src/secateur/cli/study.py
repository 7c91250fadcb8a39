"""``secateur study``: a theory of pruning, run and judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from secateur.cli.common import JsonOption, console, print_json, progress_bar
from secateur.studies import STUDIES, find_study


def command(
    name: Annotated[str | None, typer.Argument(help=f"One of {', '.join(STUDIES)}; none: list them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figures and the numbers.")] = Path("results/studies"),
    seed: Annotated[int, typer.Option(help="Controls every random choice.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Run a study: its claims with verdicts, and a page with its figures and tables."""
    if name is None:
        _list(as_json)
        return
    study = find_study(name)
    with progress_bar() as progress:
        bar = progress.add_task(study.name, total=None, note="")
        findings = study.report(
            out, seed, lambda what, done, total: progress.update(bar, description=what, completed=done, total=total)
        )
    if as_json:
        print_json({"study": name, "holds": findings.holds, "claims": [vars(claim) for claim in findings.claims]})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("verdict", "claim", "expected", "found"):
        table.add_column(heading)
    for claim in findings.claims:
        verdict = "[green]holds[/]" if claim.holds else "[red]fails[/]"
        table.add_row(verdict, escape(claim.statement), escape(claim.expected), escape(claim.found))
    console.print(table)
    console.print(f"\nWrote {out / study.name}.html and .json.", markup=False)


def _list(as_json: bool) -> None:
    studies = [find_study(name) for name in STUDIES]
    if as_json:
        print_json([{"name": s.name, "title": s.title, "source": s.source} for s in studies])
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("study", "question", "source"):
        table.add_column(heading)
    for study in studies:
        table.add_row(study.name, escape(study.question), escape(study.source))
    console.print(table)
