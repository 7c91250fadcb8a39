"""The ``secateur`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from secateur import __version__
from secateur.cli import bench, compare, demo, export, inspect, leaderboard, methods, prune, study, train
from secateur.cli.common import console
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Prunes neural networks: physically smaller, proved equal to the masked network, measured in real engines.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench.app, name="bench")
app.add_typer(leaderboard.app, name="leaderboard")
app.command("demo")(demo.command)
app.command("train")(train.command)
app.command("prune")(prune.command)
app.command("compare")(compare.command)
app.command("inspect")(inspect.command)
app.command("methods")(methods.command)
app.command("export")(export.command)
app.command("study")(study.command)


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        console.print(f"secateur {__version__}", highlight=False)
        raise typer.Exit


def run() -> None:
    """Run the command line; an error that we know is one line and exit code 2."""
    try:
        app(prog_name="secateur")
    except SecateurError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_one_line(error)}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(error: SecateurError) -> str:
    return " ".join(str(error).split()).replace("[", "\\[")
