"""Benchmarks: task x network x budgets x recovery, as versioned YAML files, and the runs that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from secateur.bench.records import Reported
from secateur.core import registry
from secateur.core.budget import Budget
from secateur.core.slots import Granularity, Recovery, Scope
from secateur.core.value import Value
from secateur.errors import InvalidRecipe, UnknownName
from secateur.parts.recovery.fine_tune import FineTune
from secateur.yaml_file import read_yaml

DENSE = "dense"

SANITY = ("shuffled", "fresh")
"""Controls of any method, as ``snip+shuffled``: its mask shuffled within each layer, and new weights under its mask."""


class TaskName(Value):
    """Which data.

    Attributes:
        name: A task of `secateur.tasks`.
        version: Which version of it.
        data: Hash of the splits; None for data of the user's own, whose hash is taken when the benchmark is run.
    """

    name: str
    version: int
    data: str | None = Field(None, pattern="^[0-9a-f]{16}$")


class Ladder(Value):
    """Budgets for one kind of units, with one recovery for every method.

    Attributes:
        granularity: The units.
        budgets: From the largest network to the smallest.
        recovery: What every pruned network gets.
        scope: Which tensors or axes may be pruned; default: what each method says.
        sanity: Budgets at which each method is run with its sanity checks too (`SANITY`).
    """

    granularity: Annotated[SerializeAsAny[Granularity], BeforeValidator(Granularity.parse)]
    budgets: tuple[Budget, ...] = Field(min_length=1)
    recovery: Annotated[SerializeAsAny[Recovery], BeforeValidator(Recovery.parse)]
    scope: Scope | None = None
    sanity: tuple[Budget, ...] = ()

    @field_validator("sanity")
    @classmethod
    def _among_the_budgets(cls, sanity: tuple[Budget, ...], others: ValidationInfo) -> tuple[Budget, ...]:
        for budget in sanity:
            if budget not in others.data.get("budgets", sanity):
                raise InvalidRecipe(f"sanity must name budgets of the ladder; got {budget_label(budget)}")
        return sanity


class Variant(Value):
    """A method with other answers, under a name of its own or in the place of the method.

    Attributes:
        method: The method.
        slots: Answers that differ from the method's.
        granularities: For which ladders; default: all that the method has.
    """

    method: str
    slots: dict[str, Any] = Field(default_factory=dict)
    granularities: tuple[str, ...] | None = None


class Control(Variant):
    """What every method is compared with.

    Attributes:
        compute: What the epochs of a network with new weights are counted in (Scratch-E, Scratch-B).
    """

    compute: Literal["epochs", "dense epochs"] = "epochs"


class Claim(Value):
    """What a paper says of a method that can be checked here: one arm ends above another at the same budget.

    Attributes:
        method: On whose card it stands.
        says: The claim in words.
        source: Paper, and where in it.
        arm: Of which arm.
        above: Than which arm.
        budgets: At which budgets; default: at all that both arms have.
    """

    method: str
    says: str
    source: str
    arm: str
    above: str
    budgets: tuple[Budget, ...] | None = None


class Official(Value):
    """What a record must meet to count as official.

    Attributes:
        clean_tree: Made from committed code alone.
        seeds: Fewest seeds of the same arm and budget.
        timed: A network that became smaller was timed.
    """

    clean_tree: bool
    seeds: int = Field(ge=1)
    timed: bool


class Benchmark(Value):
    """A benchmark; see ``docs/benchmarks.md``.

    Attributes:
        name: ``task/network``, which is also the file's place below ``bench/``.
        version: Raised when the same run would give another figure.
        title: In words.
        about: What it is for and what it cannot show.
        task: Which data.
        network: Which network of the task.
        metric: What is compared, on the test split; higher is better.
        reference: Where the dense network comes from: ``trained`` anew for each seed, ``packaged`` with secateur, or
            ``pretrained`` by the library that it comes from.
        training: Of the dense reference, and of every network that starts from new or initial weights.
        seeds: Of the dense reference, the pruning and the recovery alike.
        calibration: Batches that scores may look at.
        engines: In which the compact network is timed beside the dense one.
        official: What counts as official.
        ladders: Budgets.
        controls: What methods are compared with, by name.
        variants: Methods with other answers, by names of their own, or by the name of the method whose place they take.
        only: The methods that take part; default: all that have units of one of the ladders.
        reported: Figures of papers for the same setting.
        claims: What papers say that the records decide.
    """

    name: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)*$")
    version: int = Field(ge=1)
    title: str
    about: str
    task: TaskName
    network: str
    metric: Literal["accuracy"]
    reference: Literal["trained", "packaged", "pretrained"]
    training: Annotated[FineTune, BeforeValidator(lambda v: FineTune.parse({"name": "fine-tune", **v}))]
    seeds: tuple[int, ...] = Field(min_length=1)
    calibration: int = Field(ge=1)
    engines: tuple[str, ...]
    official: Official
    ladders: tuple[Ladder, ...] = Field(min_length=1)
    controls: dict[str, Control]
    variants: dict[str, Variant] = Field(default_factory=dict)
    only: tuple[str, ...] | None = None
    reported: tuple[Reported, ...] = ()
    claims: tuple[Claim, ...] = ()

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise InvalidRecipe(f"seeds must differ from each other; got {list(seeds)}")
        return seeds

    @model_validator(mode="after")
    def _variants_take_no_other_place(self) -> Self:
        for name, variant in self.variants.items():
            if name != variant.method and name in registry.cards():
                raise InvalidRecipe(f"the variant {name!r} of {variant.method!r} has the name of another method")
        return self

    @model_validator(mode="after")
    def _claims_are_about_its_arms(self) -> Self:
        arms = (*self.controls, *self.methods())
        for arm in (name for claim in self.claims for name in (claim.arm, claim.above)):
            if arm not in arms:
                raise UnknownName(f"arm in the claims of benchmark {self.name!r}", arm, arms)
        return self

    def methods(self) -> tuple[str, ...]:
        """Return the names of the methods that take part and are no control, then those of the variants.

        A variant under the name of its method takes that one's place.
        """
        taking_part = self._all_methods() if self.only is None else self.only
        return tuple(dict.fromkeys((*taking_part, *self.variants)))

    def arm(self, name: str) -> Variant:
        """Return what a method, a variant or a control is."""
        return self.controls.get(name) or self.variants.get(name) or Variant(method=name)

    def _all_methods(self) -> tuple[str, ...]:
        wanted = {ladder.granularity.name for ladder in self.ladders}
        cards = registry.cards()
        controls = {control.method for name, control in self.controls.items() if name == control.method}
        return tuple(sorted(n for n, card in cards.items() if wanted & set(card.granularity) and n not in controls))


def benchmark_folders() -> list[Path]:
    """Return where benchmarks are looked for: ``bench/`` here, then those of secateur."""
    packaged = Path(__file__).parent / "definitions"
    return [Path("bench"), packaged if packaged.is_dir() else Path(__file__).parents[3] / "bench"]


def benchmark_names() -> tuple[str, ...]:
    """Return the names of all benchmarks."""
    found = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in benchmark_folders()
        for path in folder.rglob("*.yaml")
    }
    return tuple(sorted(found))


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name, or by the path of its file.

    Raises:
        UnknownName: There is none.
        InvalidRecipe: Its file is wrong; says where.
    """
    if name.endswith((".yaml", ".yml")):
        return read_benchmark(Path(name))
    for folder in benchmark_folders():
        path = folder / f"{name}.yaml"
        if path.is_file():
            found = read_benchmark(path)
            if found.name != name:
                raise InvalidRecipe(f"{path} says name: {found.name}; expected {name}, as its place says.")
            return found
    raise UnknownName("benchmark", name, benchmark_names())


def read_benchmark(path: Path) -> Benchmark:
    """Return the benchmark of a file.

    Raises:
        InvalidRecipe: The file is missing, is not YAML, or says something unknown.
    """
    content = read_yaml(path, "name, version, task, ladders ...")
    try:
        return Benchmark(**content)
    except InvalidRecipe as error:
        raise InvalidRecipe(f"{path}: {error}") from error


def budget_label(budget: Budget) -> str:
    """Return a budget as it is written on the command line, for example ``macs=0.5``."""
    return f"{budget.kind}={budget.value:g}"


def parse_budget(text: str) -> Budget:
    """Return the budget of ``macs=0.5``.

    Raises:
        InvalidRecipe: It is not one.
    """
    kind, _, value = text.partition("=")
    try:
        return Budget(**{kind.strip(): float(value)})
    except (TypeError, ValueError) as error:
        raise InvalidRecipe(f"{text!r} is not a budget; write for example macs=0.5 or sparsity=0.9.") from error
