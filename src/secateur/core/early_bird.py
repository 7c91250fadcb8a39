"""Early-bird tickets: the mask is taken as soon as it has settled, long before the end of training.

You et al.: Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks, ICLR 2020 (arXiv 1909.11957).
The mask that a cut would leave is looked at again and again while the network trains. Between two masks lies the
distance

    d(m, m') = number of units that one keeps and the other does not / number of units

and the mask has settled when the newest of the last few masks is close to each of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from secateur.core.hooks import Hooks, TrainingState
from secateur.core.units import Kept
from secateur.core.value import Value
from secateur.errors import InvalidRecipe


class EarlyBird(Value):
    """A cut comes at the first look at which the mask has settled, at the latest when the schedule says.

    Attributes:
        name: ``early-bird``.
        distance: Largest distance of the newest mask to each other in the window: a share of the units.
        window: How many masks are compared, the newest included.
        looks: How often the mask is looked at, evenly spaced, between the beginning of a stretch of training and the
            cut that the schedule has at its end; as many as it has epochs: once per epoch, as in the paper.
    """

    name: Literal["early-bird"] = "early-bird"
    distance: float = Field(0.1, ge=0, lt=1)
    window: int = Field(5, ge=2)
    looks: int = Field(20, ge=2)

    @model_validator(mode="after")
    def _window_can_be_filled(self) -> Self:
        if self.looks < self.window:
            raise InvalidRecipe(f"{self.looks} looks never fill a window of {self.window} masks: ask for more looks.")
        return self

    @classmethod
    def parse(cls, source: Any) -> Any:
        """Return an early bird from its name, or from a mapping with its name and settings; all else as it is."""
        settings = {"name": source} if isinstance(source, str) else source
        if isinstance(settings, Mapping) and settings.get("name") == cls.model_fields["name"].default:
            return cls(**settings)
        return source

    def settled(self, masks: list[Kept]) -> bool:
        """Return whether the newest, which is the last one, is close to all others of a full window."""
        others, newest = masks[-self.window : -1], masks[-1]
        return len(others) == self.window - 1 and all(distance(newest, mask) <= self.distance for mask in others)


def distance(first: Kept, second: Kept) -> float:
    """Return the share of the units that one of two masks of the same units keeps and the other does not."""
    differing = sum(int((mask != second[group]).sum()) for group, mask in first.items())
    return differing / sum(mask.numel() for mask in first.values())


class Watch(Hooks):
    """Looks at the mask while the network trains and ends the stretch when it has settled.

    A distance that any two masks of that density have is refused at the first look (InvalidRecipe).

    Args:
        settings: When that is.
        mask: Returns what the next cut would keep now; None if there is no further cut.
    """

    def __init__(self, settings: EarlyBird, mask: Callable[[], Kept | None]) -> None:
        self._settings, self._mask = settings, mask
        self._looks, self._masks = 0, list[Kept]()

    def on_start(self, state: TrainingState) -> None:
        """Forget what earlier stretches have shown."""
        self._looks, self._masks = 0, []

    def after_step(self, state: TrainingState) -> None:
        """Look, if it is time."""
        due = int(state.progress * self._settings.looks + 1e-9)
        if due <= self._looks:
            return
        self._looks = due
        mask = self._mask()
        if mask is None:
            return
        self._check_says_something(mask)
        self._masks = [*self._masks, mask][-self._settings.window :]
        state.stop = self._settings.settled(self._masks)

    def _check_says_something(self, mask: Kept) -> None:
        kept = sum(int(m.sum()) for m in mask.values()) / sum(m.numel() for m in mask.values())
        farthest = 2 * min(kept, 1 - kept)
        if self._settings.distance >= farthest:
            raise InvalidRecipe(
                f"Any two masks that keep {kept:.2%} of the units differ in at most {farthest:.2%}, so that a distance "
                f"of {self._settings.distance:g} is no condition. Give a smaller one: mask_from={{'name': "
                f"'early-bird', 'distance': {farthest / 10:.2g}}}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the number of looks and the masks of the window."""
        return {"looks": self._looks, "masks": self._masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._looks, self._masks = state["looks"], [dict(mask) for mask in state["masks"]]
