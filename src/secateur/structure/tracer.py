"""What a trace collects while the model runs, and what a rule may say.

`Tracer` is the vocabulary of the rules: which dims a tensor has, which dims are equal, what an operation sums over, how
much it costs, which sizes the model's code wrote down. It runs nothing itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any, Literal

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from secateur.errors import StructureError
from secateur.structure import dims as algebra
from secateur.structure.calls import FunctionCall, Sizes, line_of_code
from secateur.structure.dims import Dim, Place, freeze, leaf
from secateur.structure.history import History, first_tensor
from secateur.structure.inputs import memory_of
from secateur.structure.provenance import Attribute, Expression, Listener
from secateur.structure.roles import Use


@dataclass(frozen=True)
class Constraint:
    """The model's code says that a size equals an expression.

    Attributes:
        expression: What the code computes.
        dim: The dim whose size that is.
        where: The place in the code.
        broken: What there is to say of a cut after which they differ.
    """

    expression: Expression
    dim: Dim
    where: str
    broken: str = "the code computes a size that would not follow"


@dataclass(frozen=True)
class Site:
    """A place where an operation combines all indices of a dim: the units are *consumed* here.

    Attributes:
        argument: Name of the operation's argument.
        position: Which of its dims.
        dim: The dim's expression over axes.
        fill: The value that leaves the result as if the unit were absent (0 for a sum, -inf for a maximum).
    """

    argument: str
    position: int
    dim: Dim
    fill: float = 0.0


@dataclass(frozen=True)
class Meaning:
    """What the entries of a tensor say about the units of a dim that need not be a dim of that tensor.

    Attributes:
        what: ``index``: each names a unit; ``count``: how many rows name each unit; ``end``: where the rows of each
            unit end, if they are sorted by it.
        units: That dim.
    """

    what: Literal["index", "count", "end"]
    units: Dim


@dataclass
class Tracer(Listener):
    """Everything that one traced run has said about the model's dims."""

    dims_of: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    parameter_of: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    meaning_of: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)
    constraints: list[Constraint] = field(default_factory=list)
    value_reads: list[tuple[Expression, str]] = field(default_factory=list)
    compared: list[tuple[Attribute, Dim]] = field(default_factory=list)
    multiples: list[tuple[Dim, int, str]] = field(default_factory=list)
    followed: list[Tensor | None] = field(default_factory=list)
    chosen: list[tuple[Dim, int, str]] = field(default_factory=list)
    equal_counts: list[tuple[list[Dim], str]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    sites: dict[int, list[Site]] = field(default_factory=lambda: defaultdict(list))
    multiply_adds: dict[int, list[tuple[Dim, ...]]] = field(default_factory=lambda: defaultdict(list))
    sums: dict[int, list[Dim]] = field(default_factory=dict)
    uses: list[tuple[Use, Dim]] = field(default_factory=list)
    history: History = field(default_factory=History)
    consumers: dict[str, list[Dim]] = field(default_factory=lambda: defaultdict(list))
    calls: list[FunctionCall] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    used: dict[str, None] = field(default_factory=dict)
    trained: dict[str, None] = field(default_factory=dict)
    outputs: dict[str, list[Dim] | None] = field(default_factory=dict)
    training: bool = False
    reads_data: bool = False
    reads_values: bool = False
    computed: set[int] = field(default_factory=set)
    orders: Iterator[int] = field(default_factory=count)

    def listener(self, training: bool) -> Tracer:
        """Return a tracer for another run: it adds equations and uses, but no operations, costs or consumers."""
        return replace(
            self,
            operations=[],
            sites=defaultdict(list),
            multiply_adds=defaultdict(list),
            sums={},
            uses=[],
            history=History(),
            consumers=defaultdict(list),
            calls=[],
            modules=[],
            outputs={},
            training=training,
        )

    # ------------------------------------------------------------------------------------------ where we are

    @property
    def call(self) -> FunctionCall | None:
        """The innermost torch function that the model's code called."""
        return self.calls[-1] if self.calls else None

    def where(self) -> str:
        """Return the present place in words, for reasons that a person reads."""
        path = self.modules[-1] if self.modules else ""
        return f"{self._doing()} in {path}" if path else self._doing()

    def place(self) -> Place:
        """Return the present place, with the line of code."""
        return Place(self._doing(), self.modules[-1] if self.modules else "", line_of_code(), next(self.orders))

    def _doing(self) -> str:
        name = self.call.name if self.call else (self.operations[-1] if self.operations else "the model")
        return name.strip("_")

    # ------------------------------------------------------------------------------------------------- dims

    def dims(self, tensor: Tensor) -> list[Dim]:
        """Return the dims of a tensor; a tensor nobody has seen yet is a constant, and frozen."""
        known: list[Dim] | None = self.dims_of.get(tensor)
        if known is None or len(known) != tensor.dim():
            known = self.fresh(tensor, f"constant tensor used by {self.where()}")
        return known

    def set(self, tensor: Tensor, dims: Sequence[Dim]) -> None:
        """Record the dims of a result.

        Raises:
            StructureError: They do not have the sizes of the tensor.
        """
        if [dim.size for dim in dims] != list(tensor.shape):
            raise StructureError(f"dims {list(dims)} are not those of a tensor of shape {tuple(tensor.shape)}")
        self.dims_of[tensor] = list(dims)

    def fresh(self, tensor: Tensor, reason: str = "") -> list[Dim]:
        """Give a tensor axes of its own, frozen if a reason is given."""
        dims = [leaf(size, reason if size > 1 else "") for size in tensor.shape]
        self.set(tensor, dims)
        return dims

    def follow(self, result: Tensor, source: Tensor, dims: Sequence[Dim]) -> None:
        """Record the dims of a rearranged tensor; a parameter, and what entries mean, stay what they are."""
        self.set(result, dims)
        for known in (self.parameter_of, self.meaning_of):
            if source in known:
                known[result] = known[source]

    def mean(self, result: Tensor, what: Literal["index", "count", "end"], units: Dim) -> None:
        """Record what the entries of a result say about the units of a dim."""
        self.meaning_of[result] = Meaning(what, units)

    def meant(self, tensor: Tensor | None, what: str) -> Dim | None:
        """Return the dim about whose units the entries of a tensor say this, if there is one."""
        known: Meaning | None = None if tensor is None else self.meaning_of.get(tensor)
        return known.units if known is not None and known.what == what else None

    def names(self, tensor: Tensor | None, what: str, dim: Dim) -> bool:
        """Say that the entries of a tensor speak of the units of a dim; return whether they speak of any."""
        units = self.meant(tensor, what)
        if units is None or units.size != dim.size:
            return False
        self.unify(units, dim)
        self.followed.append(tensor)
        return True

    def keep_order(self, tensors: Iterable[Tensor], reason: str) -> None:
        """Freeze the dims whose units the entries of these tensors name: what uses them is not known to follow."""
        for tensor in tensors:
            if tensor in self.meaning_of:
                self.freeze([self.meaning_of[tensor].units], reason)

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Record which parameters and buffers take part in the run; those of a run in training mode on their own."""
        used = self.trained if self.training else self.used
        used.update((self.parameter_of[t], None) for t in tensors if t in self.parameter_of)

    def leave(self, module: str, output: Any) -> None:
        """Record the dims of what a module of the model returned, if that is a tensor or a tuple that begins with one.

        A module that runs several times has no output of its own.
        """
        first = first_tensor(output)
        dims = None if first is None or module in self.outputs else self.dims_of.get(first)
        self.outputs[module] = dims

    def read_data(self, tensors: Iterable[Tensor]) -> None:
        """Record that the model's code looks at values; what they come from decides whether its path may vary."""
        tensors = list(tensors)
        self.keep_order(tensors, "the code looks at which unit it is")
        self.reads_data = self.reads_data or any(map(self.history.depends_on_inputs, tensors))
        self.reads_values = self.reads_values or any(map(self._follows_from_state, tensors))

    def _follows_from_state(self, tensor: Tensor) -> bool:
        return memory_of(tensor) in self.computed or (tensor in self.parameter_of and tensor.is_floating_point())

    # -------------------------------------------------------------------------------------------- equations

    def unify(self, a: Dim, b: Dim) -> None:
        """Say that two dims are the same."""
        if a.find() is not b.find():
            algebra.unify(a, b, self.place())

    def freeze(self, dims: Iterable[Dim], reason: str) -> None:
        """Say that dims must not be cut, and why."""
        for dim in dims:
            freeze(dim, f"{reason} ({self.where()})")

    def constrain(self, expression: Expression | None, dim: Dim) -> None:
        """Say that the code writes `expression` where it means the size of `dim`."""
        if expression is not None and dim.size != 1:
            self.constraints.append(Constraint(expression, dim, self.where()))

    def constrain_all(self, sizes: Sizes, dims: Sequence[Dim]) -> None:
        """Constrain each dim by the size that the code wrote for it."""
        for expression, dim in zip(sizes, dims, strict=True):
            self.constrain(expression, dim)

    def keep_multiple(self, dim: Dim, multiple: int) -> None:
        """Say that the operation takes no other sizes of a dim than multiples."""
        self.multiples.append((dim, multiple, self.where()))

    def choose(self, dim: Dim, number: int) -> None:
        """Say that the operation chooses so many units of a dim: fewer must not stay."""
        self.chosen.append((dim, number, self.where()))

    def read_value(self, expression: Expression) -> None:
        """Say that the code uses a size as a number."""
        self.value_reads.append((expression, self.where()))

    def find_equal(self, a: Expression, b: Expression) -> None:
        """Say that the code has compared two integers that are equal: it may insist on that."""
        for attribute, dim in ((a, b), (b, a)):
            if isinstance(attribute, Attribute) and isinstance(dim, Dim):
                self.compared.append((attribute, dim))

    # ------------------------------------------------------------------------- what operations do with dims

    def consume(self, argument: str, tensor: Tensor, positions: Iterable[int], fill: float = 0.0) -> None:
        """Say that the operation combines all indices of some dims of an argument."""
        known = self.dims(tensor)
        for position in positions:
            if known[position].size != 1:
                self.sites[len(self.operations) - 1].append(Site(argument, position, known[position], fill))

    def contract(self, left: tuple[str, Tensor, int], right: tuple[str, Tensor, int]) -> None:
        """Say that the operation sums over the product of two dims, which therefore are equal.

        A unit is absent from the sum if one of its factors is zero, and the other is finite, as parameters are.
        """
        (_, a, i), (_, b, j) = left, right
        self.unify(self.dims(a)[i], self.dims(b)[j])
        names = [self.parameter_of.get(a), self.parameter_of.get(b)]
        for (argument, tensor, position), name in zip((left, right), names, strict=True):
            if name is None or None not in names:
                self.consume(argument, tensor, [position])
            if name is not None:
                self.consumers[name].append(self.dims(tensor)[position])

    def cost(self, *dims: Dim) -> None:
        """Say that the operation takes as many multiply-adds as the product of the sizes of `dims`."""
        self.multiply_adds[len(self.operations) - 1].append(dims)

    def use_as(self, use: Use, *dims: Dim) -> None:
        """Say what the operation uses dims for; their roles follow from it."""
        self.uses.extend((use, dim) for dim in dims)

    def remember(self, call: OpCall) -> None:
        """Add an operation to the history; sums of two computed tensors of one shape may join branches."""
        self.history.add(call.tensors, call.results)
        memory = set(map(memory_of, call.results))  # values are written into views, too
        if any(map(self._follows_from_state, call.tensors)):
            self.computed |= memory
        else:  # it may have been that of another tensor, which is gone
            self.computed -= memory
        if call.name == "add" and len(call.tensors) == 2 and call["self"].shape == call["other"].shape:
            self.sums[len(self.history.values) - 1] = self.dims(call.out)


@dataclass(frozen=True)
class OpCall:
    """One ATen operation: its name without overload and trailing underscore, its arguments by name, its result."""

    tracer: Tracer
    name: str
    arguments: Mapping[str, Any]
    result: Any

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def out(self) -> Tensor:
        """The first tensor of the result."""
        first: Tensor = self.result[0] if isinstance(self.result, tuple | list) else self.result
        return first

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensor arguments, lists opened."""
        found: list[Tensor] = []
        for value in self.arguments.values():
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, tuple | list):
                found.extend(item for item in value if isinstance(item, Tensor))
        return found

    @cached_property
    def results(self) -> list[Tensor]:
        """All tensors of the result."""
        values = self.result if isinstance(self.result, tuple | list) else [self.result]
        return [value for value in values if isinstance(value, Tensor)]
