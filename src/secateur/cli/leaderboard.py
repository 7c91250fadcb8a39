"""``secateur leaderboard``: the records as pages."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from secateur.bench import RESULTS
from secateur.cli.common import JsonOption, ResultsOption, console, messages, print_json
from secateur.errors import InvalidFile

app = typer.Typer(help="Show all records as pages.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option(help="Folder of the pages.")]
OUT = Path("docs") / "leaderboard"


@app.command("build")
def build(results: ResultsOption = RESULTS, out: OutOption = OUT, as_json: JsonOption = False) -> None:
    """Write the pages; they open from the disk and need no network."""
    from secateur.bench.site.build import build_site
    from secateur.bench.store import Store

    _check(results, out)
    boards = build_site(Store(results), out)
    if as_json:
        print_json(
            {b.benchmark.name: {"records": len(b.records), "refused": [str(r.path) for r in b.refused]} for b in boards}
        )
        return
    for board in boards:
        console.print(f"{board.benchmark.name}: {len(board.records)} records", highlight=False)
        for refused in board.refused:
            console.print(f"  refused: {refused.reason}", style="yellow", highlight=False, markup=False)
    if not boards:
        console.print(f"There are no records below {results}. Make some with: secateur bench run digits/resnet8")
    console.print(f"Wrote {out / 'index.html'}", highlight=False)


@app.command("serve")
def serve(
    results: ResultsOption = RESULTS,
    out: OutOption = Path("runs") / "leaderboard",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    browser: Annotated[bool, typer.Option(help="Open the pages in a browser.")] = True,
) -> None:
    """Serve the pages on this machine; they follow the records while a benchmark runs."""
    from secateur.bench.site.serve import Site
    from secateur.bench.store import Store

    _check(results, out)

    def on_address(address: str) -> None:
        console.print(f"Serving {address} (Ctrl-C ends it)", highlight=False)
        if browser:
            webbrowser.open(address)

    def on_build(records: int) -> None:
        console.print(f"built from {records} records", style="dim")

    def on_problem(problem: str) -> None:
        messages.print(f"The pages could not be built anew: {problem}", highlight=False, markup=False)

    site = Site(Store(results), out, on_build, on_problem)
    site.refresh()
    try:
        site.serve(port, on_address)
    except OSError as error:
        raise InvalidFile(f"Cannot serve on port {port}: {error.strerror}. Choose another with --port.") from error


def _check(results: Path, out: Path) -> None:
    if not results.is_dir():
        raise InvalidFile(f"There is no folder {results}. Name the folder of the records with --results.")
    if out.exists() and not out.is_dir():
        raise InvalidFile(f"Cannot write the pages: {out} is a file. Name a folder with --out.")
