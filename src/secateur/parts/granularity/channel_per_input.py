"""Channels as units that each input chooses anew: nothing is removed, most of it is not computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.slots import Granularity, Scope
from secateur.core.units import Kept, Limits, Scores, Units
from secateur.errors import NotApplicable, PlanMismatch
from secateur.structure.gated import gates_of
from secateur.structure.inputs import (
    Inputs,
    as_inputs,
    call_with_state,
    redrawn,
    relative_error,
    state_of,
    undisturbed,
)
from secateur.structure.plan import ConvolutionGate, Plan
from secateur.structure.surgery import gate_convolution


class ChannelPerInput(Granularity):
    """Each convolution computes so many of its channels, and which ones depends on the input (`structure.gated`).

    A unit is a place among the winners of a layer: the first is the channel that matters most for an input, whichever
    it is. Removing places leaves fewer winners. Gated are ordinary convolutions with a batch normalization behind them.
    """

    name = "channel-per-input"

    def units(self, model: nn.Module, example_inputs: Any, scope: Scope) -> GatedUnits:
        """Put gates at the convolutions in scope, which changes what `model` computes only by rounding; mutates it."""
        return GatedUnits(model, as_inputs(example_inputs), scope)


class GatedUnits(Units):
    """The places among the winners of each gated convolution.

    Attributes:
        gates: The gated convolutions by path.

    Raises:
        NotApplicable: The model has no convolution that can be gated, or has gates already.
    """

    limits = Limits(minimum=1)

    def __init__(self, model: nn.Module, inputs: Inputs, scope: Scope) -> None:
        if gates_of(model):
            raise NotApplicable("This network chooses channels for each input already; give the one that it came from.")
        self.model = model
        self.inputs = inputs
        self._norms = normalized_convolutions(model, inputs)
        if not self._norms:
            raise NotApplicable(
                "Channels per input need convolutions (Conv2d without groups) whose outputs go to a BatchNorm2d (with "
                "scale, shift and running statistics) and nowhere else; this network has none."
            )
        self.gates = {
            path: gate_convolution(model, self._gate(path, model.get_submodule(path).out_channels))  # type: ignore[arg-type]
            for path in self._norms
            if scope.admits(path)
        }

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """One vector per gated convolution, with a place for each of its channels; places that are gone stay listed."""
        return {path: torch.Size([gate.convolution.out_channels]) for path, gate in self.gates.items()}

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return nothing: no parameter belongs to a place."""
        return {}

    def sum(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Refuse: a place has no weights of its own.

        Raises:
            NotApplicable: Always.
        """
        raise NotApplicable(
            "With granularity='channel-per-input' each input chooses its own channels, so none has a fixed score. Take "
            "a method that ranks them for each input (fbs), or granularity='channel'."
        )

    def obstacles(self) -> list[str]:
        """Return why there is no unit."""
        return ["no convolution with batch normalization is in scope (widen scope.include)"]

    def removed(self) -> Kept:
        """Return the places behind the last winner."""
        sizes = {path: shape.numel() for path, shape in self.shapes.items()}
        return {path: torch.arange(sizes[path]) >= gate.winners for path, gate in self.gates.items()}

    def keep(self, kept: Kept) -> bool:
        """Leave each layer as many winners as it keeps places; always possible."""
        for path, mask in kept.items():
            self.gates[path].winners = int(mask.sum())
        return True

    def remaining(self, values: Scores, kept: Kept) -> Scores:
        """Return the values themselves: all places stay listed."""
        return values

    def reset(self, state: Mapping[str, Tensor]) -> None:
        """Load a state of the network with gates.

        Raises:
            PlanMismatch: It is one of the network without gates.
        """
        if state.keys() != self.model.state_dict().keys():
            raise PlanMismatch(
                "The gates are a part of the network that is trained, and this state dict knows none. Give the network "
                "itself those weights before pruning it."
            )
        self.model.load_state_dict(state)

    @property
    def plan(self) -> Plan:
        """Where gates stand, and how many channels each lets through."""
        return Plan(gated=tuple(self._gate(path, gate.winners) for path, gate in self.gates.items()))

    def kept_in(self, plan: Plan) -> Kept:
        """Return how many winners a plan leaves to each layer."""
        winners = {gate.convolution: gate.winners for gate in plan.gated}
        return {path: torch.arange(shape.numel()) < winners.get(path, 0) for path, shape in self.shapes.items()}

    def _gate(self, path: str, winners: int) -> ConvolutionGate:
        return ConvolutionGate(convolution=path, norm=self._norms[path], winners=winners)


def normalized_convolutions(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Return the batch normalization behind each convolution whose output nothing else reads, by path.

    Each pair is proved: with the normalization moved into the place of the convolution, the network computes the same,
    bit by bit. It does so with statistics that are drawn, because an untrained normalization commutes with much.
    """
    inputs = redrawn(inputs, seed=0)
    found = _adjacent(model, inputs)
    drawn = _drawn_statistics(model, found.values())

    def output(pairs: Mapping[str, str]) -> Any:
        with undisturbed(model), _moved(model, pairs):
            return call_with_state(model, drawn, inputs)

    expected = output({})

    def same(pairs: Mapping[str, str]) -> bool:
        return relative_error(output(pairs), expected) == 0

    return found if same(found) else {path: norm for path, norm in found.items() if same({path: norm})}


def _drawn_statistics(model: nn.Module, norms: Iterable[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for path in norms:
        for name, tensor in state_of(model.get_submodule(path)).items():
            if tensor.is_floating_point():
                values = 0.5 + torch.rand(tensor.shape, generator=generator)  # variances are positive
                drawn[f"{path}.{name}"] = values.to(tensor)
    return drawn


def _adjacent(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Return which normalization read the output of which convolution; each ran once and has weights of its own."""
    paths = {module: path for path, module in model.named_modules()}
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[nn.Module, nn.Module] = {}
    calls = Counter[nn.Module]()

    def convolved(module: nn.Module, args: Any, output: Tensor) -> None:
        made[id(output)] = (module, output)  # the tensor itself, so that no other gets its id
        calls[module] += 1

    def normalized(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[module] += 1
        if id(args[0]) in made:
            found[made[id(args[0])][0]] = module

    with undisturbed(model), ExitStack() as stack:
        for module in paths:
            if _is_plain(module):
                stack.callback(module.register_forward_hook(convolved).remove)
            elif _is_complete(module):
                stack.callback(module.register_forward_pre_hook(normalized).remove)
        model(*inputs.args, **inputs.kwargs)
    shared = _shared(model)
    return {
        paths[convolution]: paths[norm]
        for convolution, norm in found.items()
        if calls[convolution] == calls[norm] == 1 and shared.isdisjoint(map(id, _parameters(convolution, norm)))
    }


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.groups == 1


def _is_complete(module: nn.Module) -> bool:
    return type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats


def _parameters(*modules: nn.Module) -> Iterator[nn.Parameter]:
    for module in modules:
        yield from module.parameters()


def _shared(model: nn.Module) -> set[int]:
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in names.items() if count > 1}


@contextmanager
def _moved(model: nn.Module, pairs: Mapping[str, str]) -> Iterator[None]:
    """Let each convolution return what its normalization makes of its output, and the normalization its input."""

    def normalize(norm: _BatchNorm) -> Any:
        return lambda module, args, output: norm.forward(output)

    with ExitStack() as stack:
        for path, norm_path in pairs.items():
            norm: Any = model.get_submodule(norm_path)
            stack.callback(model.get_submodule(path).register_forward_hook(normalize(norm)).remove)
            stack.callback(norm.register_forward_hook(lambda module, args, output: args[0]).remove)
        yield
