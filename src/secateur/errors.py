"""The exceptions that secateur raises.

Every message says what failed, what was got, what was expected and what to do next. Each class is also a child
of the built-in exception that a caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SecateurError(Exception):
    """Root of all errors that secateur raises on purpose."""


MOST_SHOWN = 20
"""Names that an error lists; a network has hundreds of tensors."""


class UnknownName(SecateurError, ValueError):
    """A name that nothing is registered under; the message lists what is."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"Unknown {kind} {name!r}.{known_names(name, known)}")


def known_names(name: str, known: Iterable[str]) -> str:
    """Return sentences that say which name may have been meant, and which there are."""
    options = sorted(known)
    near = get_close_matches(name, options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    more = f" and {len(options) - MOST_SHOWN} more" if len(options) > MOST_SHOWN else ""
    return f"{hint} Known: {', '.join(options[:MOST_SHOWN]) or 'none'}{more}."


class InvalidRecipe(SecateurError, ValueError):
    """A recipe, a slot or a budget that does not make sense."""


class BudgetUnreachable(SecateurError, ValueError):
    """The budget cannot be met; the message names what can."""


class NothingPrunable(SecateurError, ValueError):
    """The model has no unit that may be removed; the message says why."""


class NotApplicable(SecateurError, ValueError):
    """The method cannot work on this model or with these settings."""


class DataNeeded(SecateurError, ValueError):
    """A data-free run asked for data, or a method that needs data got none."""


class InvalidScores(SecateurError, ValueError):
    """A criterion returned scores with NaN, a wrong shape or missing groups."""


class InvalidInputs(SecateurError, ValueError):
    """The example inputs do not run through the model."""


class StructureError(SecateurError, RuntimeError):
    """The analysis of a model's structure contradicts itself or could not be proved."""


class InvalidFile(SecateurError, ValueError):
    """A file that is damaged, or not one of secateur's."""


class InvalidRecord(InvalidFile):
    """A record that was edited, is of another schema version, or says something that cannot be."""


class AlreadyRunning(SecateurError, RuntimeError):
    """Another process works on the same files."""


class PlanMismatch(SecateurError, ValueError):
    """A saved plan does not fit the model that the constructor built."""


class TrainingDiverged(SecateurError, RuntimeError):
    """The loss became NaN or infinite."""


class MissingCheckpoint(SecateurError, KeyError):
    """A recipe asks for the weights of a moment that was not kept."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the repr of the message


class MissingDependency(SecateurError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class DataUnavailable(SecateurError, FileNotFoundError):
    """A data set is neither on this machine nor downloadable; the message names the choices."""
