"""Gates: factors, one per unit, where units are consumed. A gate of 0 removes its unit, and gradients reach gates."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from secateur.core.batches import batch_size
from secateur.core.context import Context, twice_differentiable
from secateur.core.layers import holders, is_transposed
from secateur.core.units import Scores, Units
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import ChannelUnits
from secateur.parts.granularity.depth import DepthUnits
from secateur.structure.dims import unit_index


class _Place(NamedTuple):
    """Where units are gated: at the input (`reads`) or the output of the modules that share a weight, along a dim."""

    modules: list[nn.Module]
    reads: bool
    dim: int
    group: str
    units: Tensor
    """The unit of each entry along the dim, -1 for none; of length 1 if the whole tensor belongs to one unit."""


class Gates:
    """The places at which the units of a model are multiplied by gates: the inputs of the layers that read them.

    An axis that no layer reads (query and key are multiplied with each other) is gated at the output of its first
    producer, a residual branch at the output of its last layer. Layers that share a weight are gated together.

    Args:
        units: Units on axes, or residual branches.

    Raises:
        NotApplicable: Single weights, or an axis that another kind of module reads.
    """

    def __init__(self, units: Units) -> None:
        if isinstance(units, ChannelUnits):
            self._places = _places_of_axes(units)
        elif isinstance(units, DepthUnits):
            self._places = _places_of_branches(units)
        else:
            raise NotApplicable("Gates stand at channels, heads, hidden units or branches: choose such a granularity.")

    @contextmanager
    def applied(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Multiply units by gates while this lasts.

        Args:
            gates: By group; of shape (units,), or (samples, units) for factors per sample. Groups that are not named
                are not gated. Their values may change in place meanwhile.
        """
        with self._hooked({group: _Gate(values) for group, values in gates.items()}):
            yield

    @contextmanager
    def mixed(self, gates: Mapping[str, Tensor], run_controls: Callable[[], object]) -> Iterator[None]:
        """Mix units with those of other inputs while this lasts: gate * unit + (1 - gate) * the unit for its control.

        The controls run first, alone and without gradients, of which they need none: nothing in them is mixed.

        Args:
            gates: As for `applied`.
            run_controls: Calls the model on as many inputs as it is called on while this lasts, one for each.
        """
        units_of_controls: deque[Tensor] = deque()
        recorders = {group: _Recorder(values, units_of_controls) for group, values in gates.items()}
        with self._hooked(recorders), torch.no_grad():
            run_controls()
        with self._hooked({group: _Mixture(values, units_of_controls) for group, values in gates.items()}):
            yield

    @torch.no_grad()
    def fold(self, gates: Mapping[str, Tensor]) -> None:
        """Multiply gates of shape (units,) into the weights, which then do what the gates did; mutates the model."""
        for place in self._places:
            if place.group in gates:
                factor = _Gate(gates[place.group]).factor(place.units)
                _scale_inputs(place.modules[0], factor) if place.reads else _scale_outputs(place.modules, factor)

    @contextmanager
    def _hooked(self, gates: Mapping[str, _Gate]) -> Iterator[None]:
        with ExitStack() as stack:
            for place in self._places:
                for module in place.modules if place.group in gates else ():
                    stack.callback(gates[place.group].hook(module, place).remove)
            yield


class _Gate:
    """Multiplies the units of one group."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def hook(self, module: nn.Module, place: _Place) -> RemovableHandle:
        """Act at a module of a place from now on; values may change in between."""

        def of_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.act(inputs[0], self._along(inputs[0], place)), *inputs[1:])

        def of_output(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            return self.act(output, self._along(output, place))

        if place.reads:
            return module.register_forward_pre_hook(of_input)
        return module.register_forward_hook(of_output)

    def act(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * factor

    def factor(self, units: Tensor) -> Tensor:
        """Return the gates of these units, 1 for those of other groups."""
        index = units.to(self._values.device)
        picked = self._values[..., index.clamp_min(0)]
        return torch.where(index >= 0, picked, torch.ones_like(picked))

    def _along(self, x: Tensor, place: _Place) -> Tensor:
        factor = self.factor(place.units)
        shape = [1] * x.dim()
        shape[place.dim] = factor.shape[-1]
        if factor.dim() == 2:
            shape[0] = x.shape[0]
        return factor.to(x.dtype).view(shape)


class _Recorder(_Gate):
    """Lets units pass, and takes them down in the order in which they come."""

    def __init__(self, values: Tensor, seen: deque[Tensor]) -> None:
        super().__init__(values)
        self._seen = seen

    def act(self, x: Tensor, factor: Tensor) -> Tensor:
        self._seen.append(x.clone())  # a layer behind may work in place
        return x


class _Mixture(_Recorder):
    """Mixes the units of one group with those of the controls, which come in the same order in every run."""

    def act(self, x: Tensor, factor: Tensor) -> Tensor:
        control = self._seen[0]
        self._seen.rotate(-1)
        return control + factor * (x - control)


def _scale_inputs(module: nn.Module, factor: Tensor) -> None:
    """Multiply what a layer reads from each of its inputs."""
    weight = module.get_parameter("weight")
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        factor = factor.view(module.groups, -1).repeat_interleave(weight.shape[0] // module.groups, 0)  # (out, in)
        weight.mul_(factor.view(*factor.shape, *[1] * (weight.dim() - 2)))
    elif isinstance(module, nn.Linear):
        weight.mul_(factor)
    else:
        weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))


def _scale_outputs(modules: list[nn.Module], factor: Tensor) -> None:
    """Multiply each output of layers, or all of them by one factor; parameters that they share once."""
    outputs_last = {
        parameter: name == "weight" and is_transposed(module)
        for module in modules
        for name, parameter in module.named_parameters(recurse=False)
    }
    for parameter, last in outputs_last.items():
        parameter.mul_(factor if last else factor.view(-1, *[1] * (parameter.dim() - 1)))


def _places_of_axes(units: ChannelUnits) -> list[_Place]:
    places = []
    for axis in units.structure.prunable:
        kernels = [place for place in axis.members if len(units.structure.tensors[place[0]]) > 1]
        readers = [place for place in kernels if units.consumes(*place)]
        if not kernels:
            raise NotApplicable(f"No layer produces or reads the axis {axis.name!r}; exclude it from the scope.")
        for name, position in readers or kernels[:1]:
            modules = holders(units.model, name)
            dim = _unit_dim(modules, axis.name)
            index = unit_index(units.structure.tensors[name][position], axis.leaf)
            of_each_group = getattr(modules[0], "groups", 1) if position == 1 else 1
            places.append(_Place(modules, bool(readers), dim, axis.name, index.repeat(of_each_group)))
    return places


def _places_of_branches(units: DepthUnits) -> list[_Place]:
    return [
        _Place([units.model.get_submodule(branch.gate[0].rpartition(".")[0])], False, -1, group, torch.tensor([i]))
        for group, branches in units.groups.items()
        for i, branch in enumerate(branches)
    ]


def _unit_dim(modules: list[nn.Module], axis: str) -> int:
    """Return which dim of the inputs or outputs of layers that share a weight holds the units."""
    for module in modules:
        if not isinstance(module, _ConvNd | nn.Linear) and not is_transposed(module):
            raise NotApplicable(
                f"The axis {axis!r} is read by a {type(module).__name__}; gates can stand before linear and "
                "convolutional layers. Exclude the axis from the scope."
            )
    return 1 if isinstance(modules[0], _ConvNd) else -1


def gate_gradients(context: Context) -> Iterator[Scores]:
    """Yield, for each batch, dL_n/dz of every sample's own loss by every unit's gate z = 1: (samples, units) by group.

    The loss must be the mean over the samples, and no operation may mix samples; scores are taken in eval mode, in
    which batch normalization does not.
    """
    gates = Gates(context.units)
    for batch in context.batches():
        samples = batch_size(batch)
        values = _open_gates(context, samples)
        with context.undisturbed(), gates.applied(values):
            slopes = torch.autograd.grad(context.loss_of(batch), list(values.values()), materialize_grads=True)
        yield {group: slope * samples for group, slope in zip(values, slopes, strict=True)}


def gate_curvature(context: Context) -> Iterator[tuple[Scores, Scores]]:
    """Yield, for each batch, dL/dz and d2L/dz2 of the mean loss by every unit's gate z = 1: (units,) by group.

    The diagonal of the Hessian is taken row by row: one more backward pass for every unit.
    """
    gates = Gates(context.units)
    for batch in context.batches():
        values = _open_gates(context)
        with context.undisturbed(), twice_differentiable(), gates.applied(values):
            loss = context.loss_of(batch)
            slopes = torch.autograd.grad(loss, list(values.values()), create_graph=True, materialize_grads=True)
            curvature = {
                group: torch.stack([_row(slope[j], values[group])[j] for j in range(slope.numel())])
                for group, slope in zip(values, slopes, strict=True)
            }
        slope = {group: s.detach() for group, s in zip(values, slopes, strict=True)}
        n = batch_size(batch)
        yield context.mean_over_processes(slope, n), context.mean_over_processes(curvature, n)


def ablations(context: Context) -> Iterator[Scores]:
    """Yield, for each batch, the change of the mean loss when each unit alone is removed: (units,) by group.

    The gate of the unit is 0. One forward pass for every unit, and one more.
    """
    gates = Gates(context.units)
    for batch in context.batches():
        change: Scores = {}
        with context.undisturbed(), torch.no_grad():
            loss = context.loss_of(batch)
            for group, shape in context.units.shapes.items():
                without = []
                for gate in 1 - torch.eye(shape.numel(), device=loss.device):
                    with gates.applied({group: gate}):
                        without.append(context.loss_of(batch))
                change[group] = torch.stack(without) - loss
        yield context.mean_over_processes(change, batch_size(batch))


def _row(slope: Tensor, gates: Tensor) -> Tensor:
    return torch.autograd.grad(slope, gates, retain_graph=True, materialize_grads=True)[0]


def _open_gates(context: Context, *samples: int) -> Scores:
    """Return gates of 1 for every unit, to which gradients reach."""
    parameter = next(context.model.parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return {
        group: torch.ones(*samples, shape.numel(), dtype=dtype, device=parameter.device, requires_grad=True)
        for group, shape in context.units.shapes.items()
    }
