"""The recipe: a pruning run as a frozen value. A method is a recipe plus, sometimes, code of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, NonNegativeInt, SerializeAsAny

from secateur.core import schedule as _stock_schedules  # noqa: F401 (registers their names)
from secateur.core.early_bird import EarlyBird
from secateur.core.slots import Allocation, Criterion, Granularity, Recovery, Repair, Schedule, Scope, Slot
from secateur.core.value import Value

MaskSource = Annotated[Literal["end", "init"] | NonNegativeInt | EarlyBird, BeforeValidator(EarlyBird.parse)]
"""``end``: the weights as they are when pruning happens; ``init`` or a step: a checkpoint that was kept;
``early-bird``, or a mapping with that name and settings: the weights as they are when the mask has settled."""

WeightsAfterCut = Literal["same", "init", "fresh"] | NonNegativeInt
"""``same``: whatever is live; ``init`` or a step: rewound; ``fresh``: drawn anew (Scratch)."""


class FreshAtLast(Value):
    """New weights under the last mask only, which is found as it would be without them: a sanity check of that mask.

    Attributes:
        name: ``fresh-at-last``.
        earlier: Where the weights come from after all cuts but the last.
    """

    name: Literal["fresh-at-last"] = "fresh-at-last"
    earlier: WeightsAfterCut

    @classmethod
    def parse(cls, source: Any) -> Any:
        """Return one from its name or from a mapping with its name and settings; all else as it is."""
        settings = {"name": source} if isinstance(source, str) else source
        if isinstance(settings, Mapping) and settings.get("name") == cls.model_fields["name"].default:
            return cls(**settings)
        return source


WeightSource = Annotated[WeightsAfterCut | FreshAtLast, BeforeValidator(FreshAtLast.parse)]
"""The same after each cut, or another answer after the last one."""


class Recipe(Value):
    """Where the mask comes from, where the weights come from, and what happens then.

    A pruned network is ``x -> N(x; M * w')``: the mask M is found on one checkpoint, the weights w' are taken from
    another, and the network is then trained, or not (Wang et al., arXiv 2103.06460).

    Attributes:
        criterion: How valuable is a unit?
        scope: Which tensors may be pruned?
        mask_from: Scores on which checkpoint?
        weights_from: Values from which checkpoint?
        granularity: What is the smallest unit?
        allocation: How are units shared between groups?
        schedule: When, in how many steps?
        repair: What happens to the kept weights at a cut?
        recovery: What training repairs the network?

    Example:
        >>> Recipe(criterion="magnitude", granularity="channel").criterion.name
        'magnitude'
    """

    criterion: Annotated[SerializeAsAny[Criterion], BeforeValidator(Criterion.parse)]
    scope: Scope = Scope()
    mask_from: MaskSource = "end"
    weights_from: WeightSource = "same"
    granularity: Annotated[SerializeAsAny[Granularity], BeforeValidator(Granularity.parse)] = "weight"  # type: ignore[assignment]
    allocation: Annotated[SerializeAsAny[Allocation], BeforeValidator(Allocation.parse)] = "global"  # type: ignore[assignment]
    schedule: Annotated[SerializeAsAny[Schedule], BeforeValidator(Schedule.parse)] = "one-shot"  # type: ignore[assignment]
    repair: Annotated[SerializeAsAny[Repair], BeforeValidator(Repair.parse)] = Repair()
    recovery: Annotated[SerializeAsAny[Recovery], BeforeValidator(Recovery.parse)] = "none"  # type: ignore[assignment]

    def but(self, **slots: Any) -> Self:
        """Return the same recipe with some slots answered differently; None leaves a slot as it is."""
        changes = {name: answer for name, answer in slots.items() if answer is not None}
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def weights_after(self, last: bool) -> WeightsAfterCut:
        """Return where the weights come from after a cut that is the last one, or is not."""
        source = self.weights_from
        if isinstance(source, FreshAtLast):
            return "fresh" if last else source.earlier
        return source

    @property
    def from_scratch(self) -> bool:
        """Whether the pruned network owes nothing to the trained weights, and so needs a whole training."""
        return self.weights_from != "same" or self.criterion.from_scratch

    @property
    def begins_with_a_cut(self) -> bool:
        """Whether neither training nor scores that take data come before the first cut."""
        return self.criterion.weights_alone and self.schedule.levels(0.5)[0].at == 0

    @property
    def checkpoints(self) -> set[str | int]:
        """The moments, other than those of the run itself, whose weights are needed: ``init``, or steps."""
        own = {"end", "same", "fresh"}
        named = (self.mask_from, self.weights_after(last=False), self.weights_after(last=True))
        return {m for m in named if not isinstance(m, EarlyBird) and m not in own}

    @property
    def hash(self) -> str:
        """A name for the recipe that is the same on every machine: 16 hexadecimal digits.

        Settings at their defaults are left out, so a part that gets a new setting leaves all names as they were.
        """
        data = self.model_dump(mode="json", exclude_defaults=True)
        for name in type(self).model_fields:
            answer = getattr(self, name)
            if isinstance(answer, Slot) and name in data:
                data[name]["version"] = answer.version
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
