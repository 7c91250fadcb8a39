"""Gates: factors, one per unit, where units are consumed. A gate of 0 removes its unit, and gradients reach gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from secateur.core.batches import batch_size
from secateur.core.context import Context
from secateur.core.units import Scores, Units
from secateur.errors import NotApplicable
from secateur.parts.granularity.channel import ChannelUnits
from secateur.structure.dims import unit_index


class Gates:
    """The places at which the units of a model are multiplied by gates: the inputs of the layers that read them.

    An axis that no layer reads (query and key are multiplied with each other) is gated at the output of its first
    producer.

    Args:
        units: Units on axes.

    Raises:
        NotApplicable: Units that are not indices of axes, or an axis that another kind of module reads.
    """

    def __init__(self, units: Units) -> None:
        if not isinstance(units, ChannelUnits):
            raise NotApplicable("Gates stand at channels, heads or hidden units: choose such a granularity.")
        self._model = units.model
        self._places: list[tuple[nn.Module, bool, int, str, Tensor]] = []
        for axis in units.structure.prunable:
            kernels = [place for place in axis.members if len(units.structure.tensors[place[0]]) > 1]
            readers = [place for place in kernels if units.consumes(*place)]
            if not kernels:
                raise NotApplicable(f"No layer produces or reads the axis {axis.name!r}; exclude it from the scope.")
            for name, position in readers or kernels[:1]:
                module = self._model.get_submodule(name.rpartition(".")[0])
                dim = _unit_dim(module, axis.name)
                index = unit_index(units.structure.tensors[name][position], axis.leaf)
                of_each_group = getattr(module, "groups", 1) if readers else 1
                self._places.append((module, bool(readers), dim, axis.name, index.repeat(of_each_group)))

    @contextmanager
    def applied(self, gates: Mapping[str, Tensor]) -> Iterator[None]:
        """Multiply units by gates while this lasts.

        Args:
            gates: By group; of shape (units,), or (samples, units) for factors per sample. Groups that are not named
                are not gated. Their values may change in place meanwhile.
        """
        with ExitStack() as stack:
            for module, reads, dim, group, index in self._places:
                if group in gates:
                    gate = _Gate(gates[group], dim, index)
                    register = module.register_forward_pre_hook if reads else module.register_forward_hook
                    handle = register(gate.of_input if reads else gate.of_output)  # type: ignore[arg-type]
                    stack.callback(handle.remove)
            yield


class _Gate:
    def __init__(self, values: Tensor, dim: int, index: Tensor) -> None:
        self._values, self._dim, self._index = values, dim, index.to(values.device)

    def _factor(self) -> Tensor:
        """Return the factor of each index; read anew in every call, so that values may change in between."""
        inside, picked = self._index >= 0, self._values[..., self._index.clamp_min(0)]
        return torch.where(inside, picked, torch.ones_like(picked))

    def __call__(self, x: Tensor) -> Tensor:
        factor = self._factor()
        shape = [1] * x.dim()
        shape[self._dim] = x.shape[self._dim]
        if factor.dim() == 2:
            shape[0] = x.shape[0]
        return x * factor.to(x.dtype).view(shape)

    def of_input(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self(inputs[0]), *inputs[1:])

    def of_output(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return self(output)


def _unit_dim(module: nn.Module, axis: str) -> int:
    """Return which dim of a layer's input or output holds the units."""
    if isinstance(module, _ConvTransposeNd | _ConvNd):
        return 1
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":  # transformers' linear layer
        return -1
    raise NotApplicable(
        f"The axis {axis!r} is read by a {type(module).__name__}; gates can stand before linear and convolutional "
        "layers. Exclude the axis from the scope."
    )


def gate_gradients(context: Context) -> Iterator[Scores]:
    """Yield, for each batch, dL_n/dz of every sample's own loss by every unit's gate z = 1: (samples, units) by group.

    The loss must be the mean over the samples, and no operation may mix samples; scores are taken in eval mode, in
    which batch normalization does not.
    """
    gates, shapes = Gates(context.units), context.units.shapes
    device = next(context.model.parameters()).device
    for batch in context.batches():
        samples = batch_size(batch)
        values = {
            g: torch.ones(samples, shape.numel(), requires_grad=True, device=device) for g, shape in shapes.items()
        }
        with context.undisturbed(), gates.applied(values):
            slopes = torch.autograd.grad(context.loss_of(batch), list(values.values()), materialize_grads=True)
        yield {group: slope * samples for group, slope in zip(values, slopes, strict=True)}
