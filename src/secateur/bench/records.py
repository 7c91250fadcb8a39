"""Records: one JSON file per run, with everything that a claim rests on.

A record has four parts that never mix: what was run (`Run`, whose hash is the record's name), what was measured and
is the same on every repetition (`Measured`), what depends on the machine and the moment (`Machine`), and what a paper
reported (`Reported`). The content is hashed, so that an edit by hand is noticed. See ``docs/records.md``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.core.value import explain
from secateur.errors import InvalidRecord

SCHEMA: Final = 1
"""Version of the records' form; a record of another version is refused."""


class Part(BaseModel):
    """A frozen part of a record; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Run(Part):
    """What was run: all that decides the result. Equal runs have equal ids, on every machine and for every commit.

    Attributes:
        benchmark: Name of the benchmark.
        version: Of the benchmark.
        task: Name of the task.
        task_version: Of the task.
        data: Hash of the splits.
        network: Name of the network.
        metric: What is compared.
        reference: Where the dense network comes from.
        training: Settings of its training that are not the defaults.
        seed: Controls every random choice: the dense network's, the pruning's, the recovery's.
        role: The dense reference itself, a method, or a control (random pruning, training from scratch).
        arm: The name in tables: ``dense``, the method's name, or the control's.
        method: The method whose recipe was taken; None for the dense reference.
        recipe: The whole recipe; None for the dense reference.
        recipe_hash: Of the recipe with the versions of its parts.
        budget: What was asked, for example ``{"macs": 0.5}``.
        calibration: Batches that scores could look at.
    """

    benchmark: str
    version: int
    task: str
    task_version: int
    data: str
    network: str
    metric: str
    reference: str
    training: dict[str, Any]
    seed: int
    role: Literal["dense", "method", "control"]
    arm: str
    method: str | None = None
    recipe: dict[str, Any] | None = None
    recipe_hash: str | None = None
    budget: dict[str, float] | None = None
    calibration: int | None = None

    @property
    def id(self) -> str:
        """The run's name: 16 hexadecimal digits; the recipe counts by its own hash, which leaves defaults out."""
        return hash_of(self.model_dump(mode="json", exclude={"recipe"}))[:16]

    @property
    def work(self) -> str:
        """What is to be done, whichever benchmark asks for it under whatever name: equal work gives equal results."""
        names = {"benchmark", "version", "role", "arm", "method"}
        return hash_of(self.model_dump(mode="json", exclude={"recipe", *names}))[:16]

    @property
    def granularity(self) -> str:
        """The name of the units, or ``dense``."""
        return str(self.recipe["granularity"]["name"]) if self.recipe else "dense"

    @property
    def budget_label(self) -> str:
        """The budget as it is written on the command line, for example ``macs=0.5``; empty for the dense reference."""
        return ",".join(f"{kind}={value:g}" for kind, value in (self.budget or {}).items())

    @property
    def group(self) -> tuple[str, str, str]:
        """Arm, granularity and budget: runs of one group differ in their seeds alone."""
        return self.arm, self.granularity, self.budget_label

    @property
    def label(self) -> str:
        """The run in words, short: ``taylor channel macs=0.5 seed 0``."""
        words = [self.arm] if self.role == "dense" else [self.arm, self.granularity, self.budget_label]
        return " ".join([*words, f"seed {self.seed}"])


class Metric(Part):
    """A share of right answers on a split, with the 95 % interval (Wilson) that the size of the split allows."""

    value: float
    low: float
    high: float
    n: int


class Size(Part):
    """What a network costs: `secateur.measure.profile.Profile` as plain numbers."""

    params: int
    nonzero_params: int
    macs: int
    effective_macs: int
    bytes: int


class Training(Part):
    """What the training after the cut took; for a dense reference, its own.

    Attributes:
        steps: Optimizer steps.
        samples: Training samples seen, counted again in each epoch.
        macs: Multiply-adds of the forward passes of the final network over them (a backward pass costs about twice
            that).
    """

    steps: int
    samples: int
    macs: int


class Measured(Part):
    """What came out; the same in every repetition on the same machine.

    Attributes:
        metrics: By name: the benchmark's metric (test split), and ``validation_accuracy``.
        dense_metric: The benchmark's metric of the dense reference of the same seed.
        before: The dense network.
        after: The pruned one; for a dense reference, the same.
        file_bytes: Size of the network's file.
        reached: The budgeted quantity that was reached, in the unit of the budget; None for a dense reference.
        sparsity: Share of the dense network's parameters that are gone or zero.
        effective_sparsity: The same, where weights without a path from the input to the output count as gone; None if
            the axes of the network could not be found.
        samples_scored: Samples that the scores took.
        training: What the training took.
        proof: Largest relative difference between the cut and the masked network; None if nothing was cut.
        widths: Units before and after, by axis; empty if nothing was cut.
        history: The training curve.
        weights: Hash of the final tensors.
    """

    metrics: dict[str, Metric]
    dense_metric: float
    before: Size
    after: Size
    file_bytes: int
    reached: float | None
    sparsity: float
    effective_sparsity: float | None
    samples_scored: int
    training: Training
    proof: float | None
    widths: dict[str, tuple[int, int]]
    history: list[dict[str, float]]
    weights: str

    @property
    def smaller(self) -> bool:
        """Whether the network is physically smaller; masks leave all parameters where they are."""
        return self.after.params < self.before.params


class Quantiles(Part):
    """Milliseconds of one call: median and 90th percentile of n calls."""

    p50_ms: float
    p90_ms: float
    n: int


class Timing(Part):
    """The pruned network and the dense one, timed in turn, call by call.

    Attributes:
        engine: What ran them.
        threads: Number of threads.
        batch: Samples in one call.
        dtype: Type of the weights.
        dense: The dense network.
        pruned: The physically smaller one.
    """

    engine: str
    threads: int
    batch: int
    dtype: str
    dense: Quantiles
    pruned: Quantiles


class Machine(Part):
    """What depends on the machine and the moment.

    Attributes:
        created: When the run ended, UTC, ISO 8601.
        seconds: Wall time by phase, ``total``, and processor time (``cpu``).
        peak_memory_bytes: Largest resident memory of the process that ran it; None where that is not known.
        latency: By engine; empty if the network did not become physically smaller.
        environment: Processor, cores, system, package versions.
    """

    created: str
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    latency: dict[str, Timing]
    environment: dict[str, str | int]


class Code(Part):
    """Which secateur it was.

    Attributes:
        version: The package's.
        commit: Of the git checkout; None outside one.
        clean: Whether all code was committed.
    """

    version: str
    commit: str | None
    clean: bool


class Reported(Part):
    """A figure of a paper for this setting: never measured by us, never mixed with what was.

    Attributes:
        method: Our name of the method.
        granularity: Of the units.
        budget: As the paper states it.
        metric: What the value is of.
        value: In the unit of our metric.
        dense: The paper's dense network.
        source: Paper and table.
        note: What differs from our setting.
    """

    method: str
    granularity: str
    budget: dict[str, float]
    metric: str
    value: float
    dense: float | None = None
    source: str
    note: str = ""

    def is_about(self, run: Run) -> bool:
        """Return whether a run has this setting; a variant or a control of the method has not."""
        return (self.method, self.granularity, self.budget) == (run.arm, run.granularity, run.budget)


class Failure(Part):
    """Why a run has no result."""

    type: str
    message: str
    traceback: str


class Record(Part):
    """One run and what came out of it.

    Attributes:
        schema_version: Of the form; ``schema`` in the file.
        id: The run's.
        run: What was run.
        status: Whether it has a result.
        measured: The result.
        error: Why there is none.
        reported: What papers say.
        machine: What depends on the machine and the moment.
        code: Which secateur it was.
    """

    schema_version: Literal[1] = Field(SCHEMA, alias="schema")
    id: str
    run: Run
    status: Literal["ok", "failed"]
    measured: Measured | None = None
    error: Failure | None = None
    reported: tuple[Reported, ...] = ()
    machine: Machine
    code: Code

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.id != self.run.id:
            raise ValueError(f"the id {self.id} is not that of the run, {self.run.id}")
        if (self.measured is not None, self.error is not None) != (self.status == "ok", self.status == "failed"):
            raise ValueError("a record that is ok has 'measured', a failed one has 'error', none has both")
        return self

    def content(self) -> dict[str, Any]:
        """Return the record as plain data, without its hash."""
        return self.model_dump(mode="json", by_alias=True)

    def repeatable(self) -> dict[str, Any]:
        """Return what an undisturbed repetition of the run gives again: all but the machine's part."""
        return {key: value for key, value in self.content().items() if key != "machine"}

    @property
    def value(self) -> float:
        """The benchmark's metric.

        Raises:
            InvalidRecord: The run failed.
        """
        if self.measured is None:
            raise InvalidRecord(f"The run {self.run.label} failed; it has no {self.run.metric}.")
        return self.measured.metrics[self.run.metric].value


def hash_of(content: Any) -> str:
    """Return the SHA-256 of plain data, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def to_text(record: Record) -> str:
    """Return a record as the text of its file."""
    content = record.content()
    return json.dumps({**content, "sha256": hash_of(content)}, indent=1, allow_nan=False) + "\n"


def read_record(path: Path) -> Record:
    """Return the record of a file.

    Raises:
        InvalidRecord: It is missing, no record, of another schema version, or was edited by hand.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRecord(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InvalidRecord(f"{path} is not JSON: {error}. Delete it and run the benchmark again.") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise InvalidRecord(f"{path} is no record: it names no schema.")
    if content["schema"] != SCHEMA:
        raise InvalidRecord(
            f"{path} has schema {content['schema']!r}; this secateur reads {SCHEMA}. Run the benchmark again."
        )
    if content.pop("sha256", None) != hash_of(content):
        raise InvalidRecord(
            f"{path} was changed after it was written: its content does not match its hash. "
            "Records are never edited; restore it, or delete it and run the benchmark again."
        )
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        raise InvalidRecord(f"{path} is no record: {explain(error)}") from error
