"""Frozen values that say what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.errors import InvalidRecipe, known_names


class Value(BaseModel):
    """A frozen record of settings; unknown settings are refused.

    Raises:
        InvalidRecipe: With the place of the error, what was got, and what was expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidRecipe(f"{type(self).__name__}: {explain(error, type(self).model_fields)}") from error


def explain(error: ValidationError, known: Iterable[str] = ()) -> str:
    """Return one problem of a validation error in one line: place, problem, what was got.

    A setting that does not exist comes before one that is missing, which is often the same one; `known` are those that
    exist.
    """
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "value_error":  # our own message, which already says what was got
        return f"{place}: {message}." if place else f"{message}."
    names = known_names(place, known) if known and first["type"] == "extra_forbidden" else ""
    return f"{place or 'value'}: {message} (got {first['input']!r}).{names}"
