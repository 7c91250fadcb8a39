"""``secateur methods``: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.table import Table

from secateur.cli.common import JsonOption, console, print_json
from secateur.core.registry import cards
from secateur.errors import UnknownName


def command(
    name: Annotated[str | None, typer.Argument(help="Show this method's card.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List all pruning methods, or show the card of one."""
    known = cards()
    if name is not None and name not in known:
        raise UnknownName("method", name, known)
    chosen = [known[name]] if name is not None else list(known.values())
    if as_json:
        print_json([card.model_dump(mode="json", exclude={"path"}) for card in chosen])
        return
    if name is not None:
        console.print(Markdown(known[name].text))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "what it does", "units", "data", "paradigm"):
        table.add_column(heading, overflow="fold")
    for card in sorted(chosen, key=lambda c: c.name):
        table.add_row(f"[bold]{card.name}[/]", card.summary, ", ".join(card.granularity), card.data, card.paradigm)
    console.print(table)
