"""Slots: the questions that a recipe answers, each with a base class for its answers.

An answer is a frozen value with a name and a few parameters. It is written ``"taylor"`` or ``{"name": "taylor",
"at": "weight"}`` in a file, and ``Taylor(at="weight")`` in Python. A class registers itself when it is defined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from secateur.core import registry
from secateur.core.value import Value
from secateur.errors import InvalidRecipe, UnknownName

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.core.batches import Loss
    from secateur.core.context import Context
    from secateur.core.engine import Run
    from secateur.core.hooks import Hooks
    from secateur.core.units import Kept, Scores, Units


class Slot(Value, ABC):
    """One answer to one question of a recipe."""

    slot: ClassVar[str] = ""
    """The question, for example ``"criterion"``."""
    name: ClassVar[str] = ""
    """The answer, for example ``"taylor"``."""
    version: ClassVar[int] = 1
    """Raised when the same settings come to mean something else, a changed default too; part of a recipe's hash."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if not cls.__dict__.get("name"):
            return
        known = _KNOWN.setdefault(cls.slot, {})
        other = known.get(cls.name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidRecipe(
                f"Two answers to {cls.slot!r} are named {cls.name!r}: {other.__module__}, {cls.__module__}."
            )
        known[cls.name] = cls

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Return an answer from itself, its name, or a mapping with its name and settings.

        Raises:
            UnknownName: No answer to this question has that name.
            InvalidRecipe: The value is none of these.
        """
        if isinstance(value, cls):
            return value
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
            raise InvalidRecipe(f"{cls.slot!r} takes a name, or a mapping with a name and settings; got {value!r}.")
        name = settings["name"]
        registry.import_parts()
        known = _KNOWN.setdefault(cls.slot, {})
        if name not in known and name in registry.method_files():
            registry.import_method(name)
        found = known.get(name)
        if found is None or not issubclass(found, cls):
            methods = registry.method_files() if cls.slot == "criterion" else ()
            raise UnknownName(cls.slot, name, {*known, *methods})
        return found(**{key: item for key, item in settings.items() if key != "name"})

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}


_KNOWN: dict[str, dict[str, type[Slot]]] = {}


class Criterion(Slot):
    """How valuable is a unit?"""

    slot = "criterion"
    works_in_training: ClassVar[bool] = False
    """Whether its hooks do what the method is about, so that a recipe that trains nothing is refused."""
    from_scratch: ClassVar[bool] = False
    """Whether it draws a network of its own, whatever weights there were."""
    learns: ClassVar[bool] = False
    """Whether its scores are learned while the network trains, so that the first cut must come after some training."""
    weights_alone: ClassVar[bool] = False
    """Whether it looks at nothing but the weights: then a cut that cannot be proved has cost nothing."""

    @abstractmethod
    def score(self, context: Context) -> Scores:
        """Return one score per unit; higher = keep. Leaves the model as it was."""

    def hooks(self, run: Run) -> Hooks | None:
        """Return what this criterion does around the training steps of a run, if anything."""
        return None


class Granularity(Slot):
    """What is the smallest thing that lives or dies together?"""

    slot = "granularity"

    @abstractmethod
    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> Units:
        """Return the units of `model` within `scope`; pruning them changes `model`."""


class Allocation(Slot):
    """How are units shared between groups?"""

    slot = "allocation"
    revives: ClassVar[bool] = False
    """Whether the last cut may bring units back that earlier ones have removed."""

    def settle(self, kept: Kept) -> Kept:
        """Return what the last cut really keeps: as many units of each group as `kept` has; default: the same."""
        return kept

    @abstractmethod
    def rank(self, scores: Scores) -> Scores:
        """Return priorities: comparable between groups, in the order of the scores within each; higher = keep."""


Precision = Literal["32-true", "bf16-mixed", "auto"]
"""Of a training: float32 throughout, bfloat16 where PyTorch's autocast finds it safe, or (``auto``) the latter only on
machines that multiply in bfloat16: others are ten times slower in it than in float32."""


class Level(NamedTuple):
    """One pruning moment of a schedule."""

    at: float
    """Position within the recovery, in [0, 1)."""
    keep: float
    """Fraction of the dense cost that is kept from then on."""


class Schedule(Slot):
    """When is pruned, in how many steps?"""

    slot = "schedule"
    restarts: ClassVar[bool] = True
    """Whether the learning rate starts anew after each pruning moment."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Weight of the earlier scores: those of a pruning moment are averaged into m * earlier + (1 - m) * new."""

    @property
    def repeats(self) -> int:
        """How many times the length that it says the recovery has."""
        return 1

    @abstractmethod
    def levels(self, keep: float) -> tuple[Level, ...]:
        """Return the pruning moments in order; the last one keeps the fraction `keep`."""


class Recovery(Slot):
    """What repairs the network?"""

    slot = "recovery"
    epochs: float = Field(0.0, ge=0)
    """Passes over the training data, all pruning moments together."""

    def loss(self, loss: Loss, output: Any, target: Any, lesson: Any) -> Tensor:
        """Return the training loss of one batch; `lesson` is what the teachers say, None if there are none."""
        return loss(output, target)


class Repair(Slot):
    """What happens to the kept weights at a cut? This base class leaves them alone."""

    slot = "repair"
    name = "none"

    def before_cut(self, context: Context, kept: Kept) -> None:
        """Change the weights of the network that is about to lose all units but `kept`; mutates the model."""

    def after_cut(self, context: Context) -> None:
        """Change the cut network, whose weights were set back if the recipe says so; mutates the model."""


class Scope(Value):
    """Which tensors may be pruned?

    Attributes:
        include: Name patterns (``*`` matches anything) of the tensors or axes that may be pruned.
        exclude: Name patterns of those that may not, whatever `include` says.
        biases: Whether vectors (biases, normalization scales) may be pruned weight by weight too.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    biases: bool = False

    def admits(self, name: str) -> bool:
        """Return whether a tensor or axis of this name may be pruned."""
        return _matches(name, self.include) and not _matches(name, self.exclude)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
