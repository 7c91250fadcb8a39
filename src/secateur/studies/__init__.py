"""Theory made executable: one file per claim, with its figure, its table and its verdict."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from secateur.errors import UnknownName

if TYPE_CHECKING:
    from secateur.studies.study import Study

STUDIES = ("edge-of-chaos", "image-restoration", "pruned-fraction", "safe-sparsity", "wide-prior")


def find_study(name: str) -> Study:
    """Return a study by name.

    Raises:
        UnknownName: No such study.
    """
    if name not in STUDIES:
        raise UnknownName("study", name, STUDIES)
    study: Study = import_module(f"secateur.studies.{name.replace('-', '_')}").STUDY
    return study
