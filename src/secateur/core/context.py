"""What a criterion may look at: weights, and lazily gradients, activations, curvature. It counts what was used.

Whatever is asked, the model is left bit-identical: parameters, buffers, gradients, modes, random state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.core.batches import Data, Loss, batch_size, default_loss, split_batch, to_model
from secateur.core.hooks import Hooks
from secateur.core.layers import holders, input_rows
from secateur.core.randomness import generator_for
from secateur.core.units import Kept, Scores, Units
from secateur.errors import DataNeeded, InvalidRecipe

Values = dict[str, Tensor]
"""One tensor per prunable parameter, by name."""

Collect = Callable[[str, nn.Module, Tensor, Tensor], None]
"""Called with (parameter name, module, its first input, its output)."""

Choose = Callable[[Scores, float], Kept]
"""Called with (scores, share of the dense cost that may stay); returns what a cut would keep."""


@dataclass
class _Usage:
    """How much data went through the model."""

    batches: int = 0
    samples: int = 0


def twice_differentiable() -> AbstractContextManager[None]:
    """Compute attention in the form that has second derivatives; PyTorch's fused kernels have none."""
    return sdpa_kernel(SDPBackend.MATH)


class Context:
    """The view of a model, its units and some data that a criterion scores from.

    Attributes:
        units: The units to score.
        generator: A random generator that the run's seed controls.
        learned: What the criterion has learned in training, if it has hooks of its own.
        keep: Share of the dense cost that stays at this cut; 1 outside of a pruning run.
    """

    def __init__(
        self,
        units: Units,
        data: Data | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        learned: Hooks | None = None,
        keep: float = 1.0,
        choose: Choose | None = None,
    ) -> None:
        self.units = units
        self.learned = learned
        self.keep = keep
        self.generator = generator_for("scores", seed)
        self._used = _Usage()
        self._data = data
        self._loss = loss
        self._choose = choose
        self._values: Values = {}
        self._gradients: Values | None = None

    def but(self, *, loss: Loss | None = None, values: Mapping[str, Tensor] | None = None) -> Self:
        """Return the same view with another loss, or with other values of some parameters; the model stays as it is.

        The data that it uses count here too.

        Args:
            loss: (output, target) -> scalar.
            values: Parameters by name; gradients are those at these values.
        """
        other = copy.copy(self)
        other._loss = loss or self._loss
        other._values = {**self._values, **(values or {})}
        other._gradients = None
        return other

    @property
    def batches_used(self) -> int:
        """Batches that went through the model so far, repeated passes counted."""
        return self._used.batches

    @property
    def samples_used(self) -> int:
        """Samples that went through the model so far, repeated passes counted."""
        return self._used.samples

    def choose(self, scores: Scores, keep: float) -> Kept:
        """Return the units that a cut by these scores would keep; nothing is cut.

        Args:
            scores: One per unit; higher = keep.
            keep: Share of the dense cost that may stay.

        Raises:
            InvalidRecipe: There is no pruning run that could cut.
        """
        if self._choose is None:
            raise InvalidRecipe("This criterion chooses while it scores, which only a pruning run can do: use prune().")
        return self._choose(scores, keep)

    @property
    def model(self) -> nn.Module:
        """The model; a criterion must not change it."""
        return self.units.model

    @property
    def weights(self) -> Values:
        """The prunable parameters, detached; no copies."""
        return {name: self._values.get(name, p).detach() for name, p in self.units.parameters().items()}

    def sum_over_units(self, values: Mapping[str, Tensor], consumed: bool = False) -> Scores:
        """Return, for each unit, the sum of element-wise values over its entries; see `Units.sum`."""
        return self.units.sum(values, consumed)

    def batches(self) -> Iterator[Any]:
        """Yield each batch of the data, on the model's device."""
        for batch, _ in self._batches():
            yield batch

    def forward(self, batch: Any) -> Any:
        """Return the model's output; its buffers stay as they are. Inside `undisturbed`."""
        args, kwargs, _ = split_batch(batch)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return torch.func.functional_call(self.model, {**buffers, **self._values}, args, kwargs)

    def loss_of(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch, with its graph. Inside `undisturbed`."""
        loss = self._loss or default_loss(batch)
        return loss(self.forward(batch), split_batch(batch)[2])

    def mean_over_processes(self, values: Values, n: int) -> Values:
        """Return the means over all processes, each with the weight `n`, so that all see the same; mutates `values`."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return values
        total = torch.tensor(float(n), dtype=torch.float64)
        torch.distributed.all_reduce(total)
        for value in values.values():
            value.mul_(n / total.item())
            torch.distributed.all_reduce(value)
        return values

    @contextmanager
    def undisturbed(self) -> Iterator[list[Tensor]]:
        """Eval mode, own random state, gradients of the prunable parameters switched on; all restored."""
        parameters = [self._values.get(name, parameter) for name, parameter in self.units.parameters().items()]
        modes = [(module, module.training) for module in self.model.modules()]
        frozen = [p for p in parameters if not p.requires_grad]
        with torch.random.fork_rng(), torch.enable_grad():
            try:
                for module, _ in modes:
                    module.training = False
                for parameter in frozen:
                    parameter.requires_grad_(True)
                yield parameters
            finally:
                for parameter in frozen:
                    parameter.requires_grad_(False)
                for module, training in modes:
                    module.training = training

    # ------------------------------------------------------------------------------------------- gradients

    def gradients(self) -> Values:
        """Return the gradient of the mean loss over all data; computed once."""
        if self._gradients is None:
            total: Values = {}
            samples = 0
            for gradient, n in self._gradient_batches():
                samples += n
                if total:
                    torch._foreach_add_(list(total.values()), list(gradient.values()), alpha=n)
                else:
                    total = dict(zip(gradient, torch._foreach_mul(list(gradient.values()), n), strict=True))
            torch._foreach_div_(list(total.values()), samples)
            self._gradients = total
        return self._gradients

    def gradient_batches(self) -> Iterator[Values]:
        """Yield the gradient of the mean loss of each batch, in one pass over the data."""
        for gradient, _ in self._gradient_batches():
            yield gradient

    def curvature_batches(self, vectors: Mapping[str, Tensor]) -> Iterator[tuple[Values, Values]]:
        """Yield the gradient of each batch's mean loss, and its Hessian times `vectors`, in one pass over the data.

        Args:
            vectors: One tensor per prunable parameter.
        """
        for gradient, product, _ in self._curvature_batches(vectors):
            yield gradient, product

    def hessian_vector_product(self, vectors: Mapping[str, Tensor]) -> Values:
        """Return the Hessian of the mean loss over all data times `vectors` (one tensor per prunable parameter)."""
        total = {name: torch.zeros_like(vectors[name]) for name in self.units.parameters()}
        samples = 0
        for _, product, n in self._curvature_batches(vectors):
            samples += n
            torch._foreach_add_(list(total.values()), list(product.values()), alpha=n)
        torch._foreach_div_(list(total.values()), samples)
        return total

    def _curvature_batches(self, vectors: Mapping[str, Tensor]) -> Iterator[tuple[Values, Values, int]]:
        names = list(self.units.parameters())
        for batch, n in self._batches():
            with self.undisturbed() as parameters, twice_differentiable():
                first = torch.autograd.grad(self.loss_of(batch), parameters, create_graph=True, materialize_grads=True)
                slope = torch.stack([(g * vectors[name]).sum() for g, name in zip(first, names, strict=True)]).sum()
                second = torch.autograd.grad(slope, parameters, materialize_grads=True)
            gradient = {name: g.detach() for g, name in zip(first, names, strict=True)}
            product = dict(zip(names, second, strict=True))
            yield self.mean_over_processes(gradient, n), self.mean_over_processes(product, n), n

    def _gradient_batches(self) -> Iterator[tuple[Values, int]]:
        for batch, n in self._batches():
            with self.undisturbed() as parameters:
                gradient = torch.autograd.grad(self.loss_of(batch), parameters, materialize_grads=True)
            yield self.mean_over_processes(dict(zip(self.units.parameters(), gradient, strict=True)), n), n

    # ------------------------------------------------------------------------------------------ activations

    def activations(self, collect: Collect) -> None:
        """Run all data through the model and hand each prunable layer's input and output to `collect`.

        Layers that share a weight come under the same name.
        """
        handles = []

        def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            return lambda module, inputs, output: collect(name, module, inputs[0], output)

        try:
            for name in self.units.parameters():
                if name.endswith(".weight"):
                    layers = holders(self.model, name)
                    handles += [layer.register_forward_hook(listener(name)) for layer in layers]
            for batch, _ in self._batches():
                with self.undisturbed(), torch.inference_mode():
                    self.forward(batch)
        finally:
            for handle in handles:
                handle.remove()

    def second_moments(self) -> Values:
        """Return E[x xᵀ] of each linear and convolutional layer's input, by the name of its weight.

        Convolution inputs are patches. Shape (in, in) with in = the number of columns of the weight as a matrix; for
        grouped convolutions (groups, in, in). Accumulated in float64, batch by batch. Normalizations are left out.
        """
        weights = self.units.parameters()
        sums: Values = {}
        counts: dict[str, int] = {}

        def collect(name: str, module: nn.Module, x: Tensor, _: Tensor) -> None:
            if weights[name].dim() == 1:
                return
            rows = input_rows(module, x).double()
            moment = torch.einsum("gri,grj->gij", rows, rows)
            sums[name] = sums[name] + moment if name in sums else moment
            counts[name] = counts.get(name, 0) + rows.shape[1]

        self.activations(collect)
        means = {name: self.mean_over_processes({name: s / counts[name]}, counts[name]) for name, s in sums.items()}
        return {name: mean[name].squeeze(0) for name, mean in means.items()}

    # ----------------------------------------------------------------------------------------------- inside

    def _batches(self) -> Iterator[tuple[Any, int]]:
        if self._data is None:
            raise DataNeeded(
                "This criterion needs data, and none was given. Pass data=, an iterable of (inputs, target)."
            )
        empty = True
        for batch in self._data:
            empty = False
            n = batch_size(batch)
            self._used.batches += 1
            self._used.samples += n
            yield to_model(batch, self.model), n
        if empty:
            raise DataNeeded(
                "The data are empty. If they are a generator, pass a list or a DataLoader: it is read twice."
            )
