"""Writes the site: one page per benchmark and per method, one page that shows any record, the framework, a guide."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import plotly.offline as plotly_offline
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from secateur.atomic import written_atomically
from secateur.bench.benchmarks import Benchmark, benchmark_names, find_benchmark
from secateur.bench.records import Record
from secateur.bench.site.entries import budget_words, command, entry, places, shards, slug, verdicts
from secateur.bench.store import Refused, Store, standing
from secateur.bench.summary import Checked, check_claims, fronts, summarize
from secateur.core.method import method, methods
from secateur.core.recipe import Recipe
from secateur.core.registry import Card
from secateur.errors import InvalidFile

STATIC = ("site.css", "live.js", "board.js", "record.js")


@dataclass(frozen=True)
class Board:
    """All that the pages know about one benchmark.

    Attributes:
        benchmark: What was asked.
        records: All valid records.
        refused: Files that are none.
        entries: Lines of the table, see `secateur.bench.site.entries.entry`.
        verdicts: Sentences.
        ladders: Arm, units, and the hypervolume of all its budgets together; the largest first within the units.
        claims: What papers say, and what the records say of it.
    """

    benchmark: Benchmark
    records: list[Record]
    refused: list[Refused]
    entries: list[dict[str, Any]]
    verdicts: list[str]
    ladders: list[tuple[str, str, float]]
    claims: list[Checked]

    @property
    def slug(self) -> str:
        """The name in addresses."""
        return slug(self.benchmark.name)

    @property
    def official(self) -> int:
        """How many lines of the table rest on official records alone."""
        return sum(line["official"] for line in self.entries)


def build_site(store: Store, out: Path, stamp: str = "") -> list[Board]:
    """Write the site of all records into the folder `out`, which is made if it is missing; returns the boards.

    The same records give the same files. Pages of benchmarks and methods that no longer exist are deleted.

    Args:
        store: The records.
        out: Folder of the pages.
        stamp: Written into each page, which asks a server at /built for it and loads anew when it is another one.

    Raises:
        InvalidFile: The folder cannot be written to.
    """
    try:
        with _uncollected():
            return _build(store, out, stamp)
    except OSError as error:
        raise InvalidFile(f"Cannot build the pages in {out}: {error}. Make it writable, or name another.") from error


@contextmanager
def _uncollected() -> Iterator[None]:
    """Do not look for garbage: with many records, which stay to the end, that takes 40 % of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build(store: Store, out: Path, stamp: str) -> list[Board]:
    boards = [_board(find_benchmark(name), store) for name in benchmark_names()]
    boards = [board for board in boards if board.records or board.refused]
    cards = methods()
    answers = [(card, slots_of(method(card.name).recipe)) for card in cards]
    render = partial(_render, stamp=stamp)
    files = {
        "index.html": render("index.html.j2", "", boards=boards),
        "record.html": render("record.html.j2", ""),
        "framework.html": render("framework.html.j2", "", methods=answers),
        "add-a-method.html": render("add_a_method.html.j2", ""),
    }
    for board in boards:
        files[f"benchmarks/{board.slug}.html"] = render("benchmark.html.j2", "../", board=board)
    for card, slots in answers:
        lines = _lines_of(card, boards)
        page = render("method.html.j2", "../", card=card, text=_card_html(card), slots=slots, lines=lines)
        files[f"methods/{card.name}.html"] = page
    for name in STATIC:
        files[f"assets/{name}"] = (resources.files("secateur.bench.site") / "static" / name).read_text("utf-8")
    files["assets/plotly.min.js"] = plotly_offline.get_plotlyjs()
    for board in boards:
        _write_shards(out, board, store)
        files |= dict.fromkeys((f"data/{name}.js" for name in shards(board.benchmark.name, board.records)), "")
    for name, text in files.items():
        if text:
            _write(out / name, text)
    _delete_others(out, files)
    return boards


def _board(benchmark: Benchmark, store: Store) -> Board:
    records, refused = store.read(benchmark.name)
    cards = {card.name: card for card in methods()}
    address = places(benchmark.name, records)
    rows = summarize(records, benchmark)
    entries = [entry(row, benchmark, cards, address) for row in rows]
    ladders = sorted(((*key, area) for key, area in fronts(rows).items()), key=lambda line: (line[1], -line[2]))
    claims = check_claims((row for row in rows if row.official), benchmark)
    return Board(benchmark, records, refused, entries, verdicts(rows), ladders, claims)


def _write_shards(out: Path, board: Board, store: Store) -> None:
    """Write the records as scripts: a page that was opened from a file may load those, but not JSON."""
    reasons = standing(board.records, board.benchmark)
    for name, records in shards(board.benchmark.name, board.records).items():
        content = {
            record.id: {
                "file": store.path_of(record).relative_to(store.folder).as_posix(),
                "page": f"benchmarks/{board.slug}.html",
                "command": command(record.run),
                "reasons": reasons[record.id],
                "label": record.run.label,
                "record": record.content(),
            }
            for record in records
        }
        _write(out / "data" / f"{name}.js", f"secateurRecords({json.dumps(content, separators=(',', ':'))});\n")


def slots_of(recipe: Recipe) -> dict[str, str]:
    """Return how a recipe answers each question, in words; settings that differ from their defaults in brackets."""
    words = {}
    for name in type(recipe).model_fields:
        answer = getattr(recipe, name)
        if not hasattr(answer, "model_dump"):
            words[name] = str(answer)
            continue
        defaults = {key: field.default for key, field in type(answer).model_fields.items()}
        other = [f"{k}={v}" for k, v in dict(answer).items() if k in defaults and v != defaults[k]]
        words[name] = getattr(answer, "name", "default") + (f" ({', '.join(other)})" if other else "")
    return words


def _lines_of(card: Card, boards: Iterable[Board]) -> list[tuple[Board, dict[str, Any]]]:
    return [(board, line) for board in boards for line in board.entries if line["page"] == card.name and line["value"]]


def _card_html(card: Card) -> Markup:
    """Return a card as HTML, without its comments; code that scrolls can be reached by the keyboard."""
    text = MarkdownIt("commonmark", {"html": False}).enable("table").render(_COMMENT.sub("", card.text))
    return Markup(text.replace("<pre>", '<pre tabindex="0">').replace("<table>", '<table tabindex="0">'))


_COMMENT = re.compile("<!--.*?-->", re.DOTALL)


@cache
def _templates() -> Environment:
    templates = Environment(loader=PackageLoader("secateur.bench.site"), autoescape=True, undefined=StrictUndefined)
    templates.filters["budget_words"] = budget_words
    templates.filters["points"] = lambda number: f"{number:+.2f}".replace("-", "\N{MINUS SIGN}")
    return templates


def _render(template: str, root: str, stamp: str, **values: Any) -> str:
    return _templates().get_template(template).render(root=root, stamp=stamp, **values)


def _delete_others(out: Path, files: Collection[str]) -> None:
    """Delete what an earlier build has written and this one has not."""
    for pattern in ("benchmarks/*.html", "methods/*.html", "data/*.js"):
        for path in out.glob(pattern):
            if path.relative_to(out).as_posix() not in files:
                path.unlink()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
