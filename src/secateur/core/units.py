"""Units: what can be removed. Criteria score them, `select` chooses among them, `keep` removes the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import InvalidScores, NotApplicable

Scores = dict[str, Tensor]
"""One score per unit, by group; higher = keep. A group's tensor has the shape that `Units.shapes` says."""

Kept = dict[str, Tensor]
"""Which units are kept, by group: bool tensors of the same shapes, True = keep."""


class Cost(Protocol):
    """What a network costs that keeps so many units of each group."""

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Return the cost of keeping so many units of each group."""
        ...


@dataclass(frozen=True)
class LinearCost:
    """A cost to which each unit of a group adds the same amount."""

    per_unit: Mapping[str, float]
    fixed: float = 0.0

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Return the cost of keeping so many units of each group."""
        return self.fixed + sum(self.per_unit[group] * count for group, count in counts.items())


@dataclass(frozen=True)
class Limits:
    """What `select` must respect.

    Attributes:
        minimum: Fewest units that stay in each group.
        multiple: Counts are multiples of this (for hardware that likes them), or the whole group.
        unrounded: Groups to which `multiple` does not apply: numbers of heads are no widths.
        ties: Groups that lose units together.
        steps: How many units such a group loses at a time, if not one: an axis that is as long as heads x head_dim
            loses head_dim units with each head.
        least: Fewest units that stay in such a group, if more than `minimum`.
    """

    minimum: int = 0
    multiple: int = 1
    unrounded: frozenset[str] = frozenset()
    ties: tuple[tuple[str, ...], ...] = ()
    steps: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)


class Call(Protocol):
    """The arguments of one call of a model."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments."""
        ...

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Keyword arguments."""
        ...


class Units(ABC):
    """The units of one model at one granularity.

    Attributes:
        model: The model; `keep` changes it, and it stays the same object.
        inputs: The example inputs: their values are no data, their shapes are those that the model takes.
        limits: What a selection must respect.
    """

    model: nn.Module
    inputs: Call
    limits: Limits
    one_must_stay: ClassVar[bool] = False
    """Whether one unit must stay at least, wherever: nobody means masks that zero everything."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of each group's scores."""

    def prove_analysis(self) -> None:  # noqa: B027 (units that are only masked need no proof)
        """Find out now what cannot be removed with proof, and freeze it; otherwise the first cut finds out."""

    @abstractmethod
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters that hold units."""

    @abstractmethod
    def sum(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Return, for each unit, the sum of element-wise values over the entries that belong to it.

        Args:
            values: One tensor per parameter, of its shape.
            consumed: Count only entries that a unit's consumers multiply it with (the input side of the next layer).
        """

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return, for each entry of each parameter, the sum of the values of the units that it belongs to.

        The adjoint of `sum`: what a unit is given, each of its entries gets.

        Args:
            values: One number per unit, by group.
        """
        entries = {name: torch.zeros_like(p, requires_grad=True) for name, p in self.parameters().items()}
        with torch.enable_grad():
            sums = self.sum(entries)
            total = torch.stack([(sums[group] * value.to(sums[group])).sum() for group, value in values.items()]).sum()
        found = torch.autograd.grad(total, list(entries.values()), materialize_grads=True)
        return dict(zip(entries, found, strict=True))

    @abstractmethod
    def obstacles(self) -> list[str]:
        """Return why units of this model may not be removed, one reason each."""

    def removed(self) -> Kept:
        """Return which units are gone already (True = gone) but still listed; empty if none is."""
        return {}

    @abstractmethod
    def keep(self, kept: Kept) -> bool:
        """Remove all other units; mutates `model`.

        Returns:
            Whether that was possible. If not, nothing has changed, and the groups that are to blame are not listed any
            more.
        """

    def remaining(self, values: Scores, kept: Kept) -> Scores:
        """Return what `values` say of the units that will be listed after ``keep(kept)``; called before it.

        This base class is for units that are no longer listed once they are removed.
        """
        return {group: v[kept[group].to(v.device)] for group, v in values.items() if group in kept}

    @abstractmethod
    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Give the kept part of the model the values of a state dict of the unpruned model."""

    def redraw(self) -> None:
        """Draw all weights of the kept part anew; mutates `model`. See `draw_fresh`."""
        draw_fresh(self.model)

    def counts(self) -> dict[str, int]:
        """Return the number of units in each group that are not gone."""
        gone = self.removed()
        return {g: shape.numel() - (int(gone[g].sum()) if g in gone else 0) for g, shape in self.shapes.items()}

    def alive(self) -> dict[str, int]:
        """Return the number of units in each group whose removal would change something; default: all that are left."""
        return self.counts()

    def check(self, scores: Scores) -> None:
        """Refuse scores that do not fit.

        Raises:
            InvalidScores: NaN, a missing or an unknown group, or a wrong shape.
        """
        shapes = self.shapes
        if scores.keys() != shapes.keys():
            missing, extra = sorted(shapes.keys() - scores.keys()), sorted(scores.keys() - shapes.keys())
            raise InvalidScores(f"The criterion must score every group. Missing: {missing[:3]}; unknown: {extra[:3]}.")
        for group, values in scores.items():
            if values.shape != shapes[group]:
                raise InvalidScores(
                    f"The scores of {group!r} have shape {tuple(values.shape)}; "
                    f"expected {tuple(shapes[group])}, one per unit."
                )
            if bool(values.isnan().any()):
                n = int(values.isnan().sum())
                raise InvalidScores(
                    f"{n} of the {values.numel()} scores of {group!r} are NaN. "
                    "Check the model's weights and the data for NaN and infinite values."
                )


def draw_fresh(model: nn.Module) -> None:
    """Draw all weights anew, as the layers' constructors do; mutates `model`.

    Raises:
        NotApplicable: A parameter whose module has no ``reset_parameters``.
    """
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        elif own:
            raise NotApplicable(
                f"Fresh weights need a reset_parameters() method, which {type(module).__name__} {path!r} lacks for "
                f"{own[0]!r}. Add one, or take weights_from='init' with checkpoints={{'init': ...}}."
            )
