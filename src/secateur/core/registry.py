"""Finds methods: pairs ``x.py`` + ``x.md`` in ``secateur/methods`` and in the folders of ``SECATEUR_METHODS_PATH``.

Listing methods reads only the cards' front matter; a method's Python file is imported when it is used, so a broken
method breaks nothing but itself. Two methods of one name are an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.errors import InvalidRecipe, UnknownName

PLUGIN_VARIABLE = "SECATEUR_METHODS_PATH"


class Card(BaseModel):
    """The front matter of a method's card.

    Attributes:
        name: The method's name, equal to the file's.
        title: What the field calls it.
        summary: One sentence.
        paper: Authors, title, venue.
        url: Where the paper is.
        year: Of publication.
        paradigm: When the mask is found.
        granularity: The units that it can score.
        data: What scoring needs: nothing, inputs, or inputs with labels.
        reference: The reference code, or "none".
        path: The card's file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    title: str
    summary: str
    paper: str
    url: str
    year: int
    paradigm: Literal[
        "baseline", "after training", "at initialization", "during training", "per input", "searched", "one-shot"
    ]
    granularity: tuple[str, ...]
    data: Literal["none", "inputs", "labels"]
    reference: str
    path: Path

    @property
    def text(self) -> str:
        """The card's Markdown, without the front matter."""
        return _split(self.path)[1]


def method_folders() -> list[Path]:
    """Return the folders in which methods are looked for, the package's own first."""
    extra = [Path(p) for p in os.environ.get(PLUGIN_VARIABLE, "").split(os.pathsep) if p]
    return [Path(__file__).parent.parent / "methods", *extra]


def method_files() -> dict[str, Path]:
    """Return the Python file of every method by name.

    Raises:
        InvalidRecipe: Two methods of one name, or a folder that does not exist.
    """
    files: dict[str, Path] = {}
    for folder in method_folders():
        if not folder.is_dir():
            raise InvalidRecipe(f"{PLUGIN_VARIABLE} names {str(folder)!r}, which is not a folder.")
        for card in sorted(folder.glob("*.md")):
            path = card.with_suffix(".py")
            if not path.exists():
                raise InvalidRecipe(f"The card {card} has no Python file beside it; a method is x.py and x.md.")
            if card.stem in files:
                raise InvalidRecipe(f"Two methods are named {card.stem!r}: {files[card.stem]} and {path}.")
            files[card.stem] = path
    return files


def cards() -> dict[str, Card]:
    """Return every card by method name, without importing any method."""
    return {name: _read_card(path.with_suffix(".md")) for name, path in method_files().items()}


def import_method(name: str) -> ModuleType:
    """Return the imported Python file of a method.

    Raises:
        UnknownName: There is no such method.
    """
    files = method_files()
    if name not in files:
        raise UnknownName("method", name, files)
    path = files[name]
    if path.parent == method_folders()[0]:
        return importlib.import_module(f"secateur.methods.{name}")
    module_name = f"secateur_plugin_{name}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise InvalidRecipe(f"{path} cannot be imported as a Python module.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]


@cache
def import_parts() -> None:
    """Import every stock part, so that its name is known."""
    parts = importlib.import_module("secateur.parts")
    for module in pkgutil.walk_packages(parts.__path__, "secateur.parts."):
        importlib.import_module(module.name)


def _read_card(path: Path) -> Card:
    try:
        card = Card.model_validate({**_split(path)[0], "path": path})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRecipe(
            f"The card {path} is wrong at {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from error
    if card.name != path.stem:
        raise InvalidRecipe(f"The card {path} says name: {card.name}; expected {path.stem}.")
    return card


def _split(path: Path) -> tuple[dict[str, Any], str]:
    """Return front matter and body. Front matter is flat YAML: ``key: text``, or ``key: [list]`` in JSON notation."""
    head, fence, body = path.read_text(encoding="utf-8").removeprefix("---\n").partition("\n---\n")
    if not fence:
        raise InvalidRecipe(f"The card {path} has no front matter between two lines of '---'.")
    fields: dict[str, Any] = {}
    for line in head.splitlines():
        key, colon, value = line.partition(":")
        if not colon:
            raise InvalidRecipe(f"The card {path} has a front matter line without a colon: {line!r}.")
        value = value.strip()
        try:
            fields[key.strip()] = json.loads(value) if value.startswith("[") else value
        except json.JSONDecodeError as error:
            raise InvalidRecipe(f"The card {path} has a list that is not JSON: {line!r}.") from error
    return fields, body
