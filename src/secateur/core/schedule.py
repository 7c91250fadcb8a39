"""When is pruned, and how much is kept from then on."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from secateur.core.slots import Level, Schedule
from secateur.errors import InvalidRecipe


class OneShot(Schedule):
    """Everything at once.

    Attributes:
        at: Where in the recovery, in [0, 1); what comes before is training of the unpruned network.
    """

    name = "one-shot"
    momentum: Literal[0] = 0
    at: float = Field(0.0, ge=0, lt=1)

    def levels(self, keep: float) -> tuple[Level, ...]:
        """Return one level."""
        return (Level(self.at, keep),)


class Iterative(Schedule):
    """The same fraction of what is left, several times (geometric).

    Attributes:
        steps: Number of pruning moments.
        span: The part of the recovery that they divide into equal stretches, one after each; what is left trains the
            final network. 1: all of it; 0: all cuts come before any training.
        whole: The recovery is so many times as long as it says, so that each moment has a whole one for itself.
    """

    name = "iterative"
    steps: int = Field(5, ge=1)
    span: float = Field(1.0, ge=0, le=1)
    whole: bool = False

    @property
    def repeats(self) -> int:
        """As many as there are pruning moments, if each has a whole recovery."""
        return self.steps if self.whole else 1

    def levels(self, keep: float) -> tuple[Level, ...]:
        """Return keep^(1/n), keep^(2/n), ..., keep."""
        n = self.steps
        return tuple(Level(self.span * i / n, keep if i == n - 1 else keep ** ((i + 1) / n)) for i in range(n))


class Gradual(Schedule):
    """The sparsity rises to its end along a polynomial, at equal distances: 1 - keep = s_f (1 - (1 - t)^power).

    Attributes:
        steps: Number of pruning moments.
        start: Where in the recovery the first one is, in [0, 1).
        end: Where the last one is; the rest of the recovery trains the final network.
    """

    restarts: ClassVar[bool] = False
    power: ClassVar[int] = 1
    """Of the polynomial."""
    steps: int = Field(10, ge=2)
    start: float = Field(0.0, ge=0, lt=1)
    end: float = Field(0.75, gt=0, lt=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.end <= self.start:
            raise InvalidRecipe(
                f"A {self.name} schedule must end after it starts; got start={self.start}, end={self.end}."
            )
        return self

    def levels(self, keep: float) -> tuple[Level, ...]:
        """Return 1 - s with s(t) = s_f - s_f (1 - t)^power for t = 1/n, ..., 1."""
        levels = []
        for i in range(self.steps):
            progress = (i + 1) / self.steps
            at = self.start + (self.end - self.start) * i / (self.steps - 1)
            sparsity = (1 - keep) * (1 - (1 - progress) ** self.power)
            levels.append(Level(at, keep if i == self.steps - 1 else 1 - sparsity))
        return tuple(levels)


class Cubic(Gradual):
    """Gradual pruning: fast at first, slower towards the end (Zhu & Gupta, arXiv 1710.01878, eq. 1)."""

    name = "cubic"
    power: ClassVar[int] = 3


class Linear(Gradual):
    """The same amount at each moment."""

    name = "linear"
