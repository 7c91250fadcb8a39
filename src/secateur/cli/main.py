"""The ``secateur`` command."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from secateur.cli import demo, export, inspect, methods, prune, train
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Prunes neural networks: physically smaller, proved equal to the masked network, measured in real engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.command)
app.command("train")(train.command)
app.command("prune")(prune.command)
app.command("inspect")(inspect.command)
app.command("methods")(methods.command)
app.command("export")(export.command)


def run() -> None:
    """Run the command line; an error that we know is one line and exit code 2."""
    try:
        app()
    except SecateurError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_one_line(error)}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(error: SecateurError) -> str:
    return " ".join(str(error).split()).replace("[", "\\[")
