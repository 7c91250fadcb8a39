"""Teachers: networks that show a pruned one, in training, what they make of the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.batches import Loss, default_loss, split_batch, to_model
from secateur.core.units import Units
from secateur.errors import InvalidInputs, NotApplicable, PlanMismatch, UnknownName
from secateur.parts.granularity.cut import CutUnits
from secateur.parts.recovery.distill import Distill, Lesson
from secateur.structure.dims import mask_under
from secateur.structure.history import first_tensor
from secateur.structure.inputs import state_of
from secateur.structure.plan import Plan
from secateur.structure.structure import Structure
from secateur.structure.surgery import copied
from secateur.structure.trace import trace

Teachers = nn.Module | Mapping[str, Tensor] | Sequence[nn.Module | Mapping[str, Tensor]]
"""A network, the state dict of one like the unpruned model, or several of these."""

Features = dict[str, Tensor]
"""What modules returned, by path."""

Cuts = list[tuple[int, Tensor]]
"""The dims of a tensor that lose indices: each with a mask over its indices, True = kept."""


class Teacher:
    """The parent of a pruned network and perhaps others, none of which is ever changed.

    In a training loop of your own, ``loss(batch)`` takes the place of the forward pass and the loss
    (`secateur.Pruner.teacher` makes one).

    Args:
        settings: What is learned from them.
        student: The network in training; what it has lost is known from `follow`.
        parent: The unpruned network: the first teacher, and the one whose features are compared.
        others: Further networks with the same outputs.
        structure: Of the parent; needed to compare features.

    Raises:
        UnknownName: A module is to be compared that does not exist, or that returns no tensor, or runs several times.
        NotApplicable: There is no module to compare.
        InvalidInputs: A teacher is no network, or a state dict that does not fit.
    """

    def __init__(
        self,
        settings: Distill,
        student: nn.Module,
        parent: nn.Module,
        others: Teachers = (),
        structure: Structure | None = None,
    ) -> None:
        self.settings, self.student, self.parent = settings, student, parent
        self._networks = (parent, *_networks(others, parent))
        self._structure = structure
        self._modules = compared_modules(structure, settings.modules) if structure and settings.features else ()
        self._cuts: dict[str, Cuts] = {}
        self.follow(Plan())

    def follow(self, plan: Plan) -> None:
        """Take note that only this much of the parent is left in the student."""
        if self._structure is not None:
            left = [name for name in self._modules if not plan.drops(f"{name}.")]
            self._cuts = output_cuts(self._structure, plan, left)

    def teach(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Lesson]:
        """Return the student's output for some inputs, and what the teachers say.

        Args:
            forward: Runs the student: itself, or what wraps it.
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        with torch.no_grad(), _evaluating(self._networks), watched(self.parent, self._cuts) as shown:
            outputs = tuple(network(*args, **kwargs) for network in self._networks)
        with watched(self.student, self._cuts) as seen:
            output = forward(*args, **kwargs)
        return output, Lesson(outputs, tuple(self._pair(name, seen, shown) for name in self._cuts))

    def loss(self, batch: Any, loss: Loss | None = None) -> Tensor:
        """Return the whole loss of the student on one batch: the task's, mixed with what the teachers say.

        Args:
            batch: A pair (inputs, target), a mapping, or inputs alone if `alpha` is 1.
            loss: (output, target) -> scalar; default: the model's own for mappings, else cross-entropy.
        """
        batch = to_model(batch, self.student)
        args, kwargs, target = split_batch(batch)
        output, lesson = self.teach(self.student, args, kwargs)
        return self.settings.loss(loss or default_loss(batch), output, target, lesson)

    def _pair(self, name: str, seen: Features, shown: Features) -> tuple[Tensor, Tensor]:
        """Return the features of a module in the student, and the same units of it in the parent."""
        student, parent = seen.get(name), shown.get(name)
        if student is None or parent is None:
            raise InvalidInputs(
                f"The module {name!r} did not run on this batch, so it cannot be compared. Name others."
            )
        for position, kept in self._cuts[name]:
            if position < parent.dim() and parent.shape[position] == len(kept):
                parent = parent.index_select(position, kept.nonzero().flatten().to(parent.device))
        if student.shape != parent.shape:
            raise InvalidInputs(
                f"The module {name!r} returns {tuple(student.shape)} in the student and {tuple(parent.shape)} in what "
                "is left of its parent: samples and units share a dim there. Name other modules to compare."
            )
        return student, parent


def make_teacher(settings: Distill, units: Units, parent: nn.Module, others: Teachers = ()) -> Teacher:
    """Return a teacher of the network that `units` are of; see `Teacher`.

    Raises:
        PlanMismatch: The parent is not like the unpruned network.
    """
    structure = None
    if settings.features:
        structure = units.dense_structure if isinstance(units, CutUnits) else trace(parent, units.inputs)
        expected = {name: tuple(dim.size for dim in dims) for name, dims in structure.tensors.items()}
        if {name: tuple(tensor.shape) for name, tensor in state_of(parent).items()} != expected:
            raise PlanMismatch("The features of a teacher are compared with its parent's: pass the unpruned network.")
    teacher = Teacher(settings, units.model, parent, others, structure)
    if isinstance(units, CutUnits):
        teacher.follow(units.plan)
    return teacher


def compared_modules(structure: Structure, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the paths of the modules whose outputs a student compares with its parent's.

    Args:
        structure: Of the parent.
        names: Those that were asked for; default: the modules in which residual branches are added up; without any,
            all linear and convolutional layers but the last.

    Raises:
        UnknownName: A name of no module whose output is known.
        NotApplicable: There is no module to compare by default.
    """
    for name in names:
        if name not in structure.outputs:
            raise UnknownName("module to compare (one that runs once and returns a tensor)", name, structure.outputs)
    if names or structure.blocks:
        return tuple(names or structure.blocks)
    layers = (name.rpartition(".")[0] for name in structure.order if structure.consumers.get(name))
    found = tuple(dict.fromkeys(path for path in layers if path in structure.outputs))[:-1]
    if not found:
        raise NotApplicable("This network has no module whose features could be compared. Name some, or features=0.")
    return found


def output_cuts(structure: Structure, plan: Plan, modules: Sequence[str]) -> dict[str, Cuts]:
    """Return what a plan keeps of the output of each module."""
    masks = structure.masks({name: _mask(axis.size, axis.kept) for name, axis in plan.axes.items()})
    cuts: dict[str, Cuts] = {}
    for name in modules:
        over_dims = (mask_under(dim, masks) for dim in structure.outputs[name])
        cuts[name] = [(position, mask) for position, mask in enumerate(over_dims) if not bool(mask.all())]
    return cuts


def _mask(size: int, kept: Sequence[int]) -> Tensor:
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, torch.tensor(kept), True)


@contextmanager
def watched(model: nn.Module, modules: Mapping[str, Any]) -> Iterator[Features]:
    """Yield what some modules of a model return while the block runs, by path, as it comes."""
    seen: Features = {}

    def listener(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def listen(module: nn.Module, inputs: Any, output: Any) -> None:
            features = first_tensor(output)
            if features is not None:
                seen[name] = features

        return listen

    with ExitStack() as stack:
        for name in modules:
            stack.callback(model.get_submodule(name).register_forward_hook(listener(name)).remove)
        yield seen


@contextmanager
def _evaluating(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Set eval mode; restored."""
    training = [module for network in networks for module in network.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _networks(teachers: Teachers, parent: nn.Module) -> list[nn.Module]:
    """Return teachers as networks; state dicts go into copies of the parent."""
    several = [teachers] if isinstance(teachers, nn.Module | Mapping) else list(teachers)
    return [_network(teacher, parent) for teacher in several]


def _network(teacher: Any, parent: nn.Module) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, Mapping):
        raise InvalidInputs(
            f"A teacher is a network, or a state dict of the unpruned one; got {type(teacher).__name__}."
        )
    network = copied(parent)
    try:
        network.load_state_dict(teacher)
    except RuntimeError as error:
        raise InvalidInputs(f"A teacher's state dict does not fit the unpruned network: {error}") from error
    return network
