"""How sparse a network may become before pruning at random cuts signals of its data off.

Yang, Liang, Guo, Wu, Wang: Theoretical Characterization of How Neural Network Pruning Affects its Generalization, 2023
(arXiv 2301.00335): a network that is pruned at random before it is trained still drives its training loss to zero as
long as every signal is seen by some of its neurons, and knows nothing beyond. At density p a signal with n weights is
cut off with probability (1 - p)^n, so a layer of any network loses at most

    sum over inputs that carry a signal of (1 - p)^(weights out of it) + sum over outputs of (1 - p)^(weights into it)

units in the mean. The safe density is the smallest one at which this is below the accepted risk: about
log(units / risk) / weights per unit. `secateur study pruned-fraction` tests it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor, nn

from secateur.core.batches import Data, logits_and_labels, split_batch, to_model
from secateur.core.layers import is_transposed
from secateur.core.randomness import generator_for
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, InvalidInputs, NotApplicable, NothingPrunable, SecateurError
from secateur.structure.inputs import undisturbed

PLACES = 4
"""Of a channel that has a value at each of many positions, the means over so many stretches are looked at."""

SIGNIFICANCE = 0.01
"""Chance that among all inputs of a layer one without a signal is taken for one that has one."""


@dataclass(frozen=True)
class LayerSignals:
    """What a layer may lose.

    Attributes:
        name: Of its weight.
        weights: How many it has.
        inputs: How many units it reads.
        signals: How many of them carry a signal. A layer without any is not judged and counts as dense.
        density: The share of the weights that must stay so that, with the asked confidence, no unit is cut off.
    """

    name: str
    weights: int
    inputs: int
    signals: int
    density: float


@dataclass(frozen=True)
class Estimate:
    """A sparsity up to which nothing is cut off, all in [0, 1].

    Attributes:
        safe: Holds with the asked confidence, by the bound.
        draws: The sparsity at which the first unit was cut off, in each of some random masks.
    """

    safe: float
    draws: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the draws."""
        return sum(self.draws) / len(self.draws)

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval of the mean, by Student's t."""
        n = len(self.draws)
        spread = math.sqrt(sum((draw - self.mean) ** 2 for draw in self.draws) / (n - 1))
        return float(stats.t.ppf(0.975, n - 1)) * spread / math.sqrt(n)


@dataclass(frozen=True)
class SafeSparsity:
    """How sparse a network may become before pruning at random cuts signals off.

    Attributes:
        layers: In the order of the model.
        by_layer: If each layer has a density of its own, that of `layers`.
        uniform: If all layers have the same density.
        confidence: Probability that nothing is cut off at the safe sparsity, at least.
        samples: How many showed where the signals are.
        classes: How many there are.
    """

    layers: tuple[LayerSignals, ...]
    by_layer: Estimate
    uniform: Estimate
    confidence: float
    samples: int
    classes: int

    @property
    def assumptions(self) -> str:
        """What must be true for the estimate to mean something, in words."""
        return (
            f"Assumes that signals are differences between the means of the {self.classes} classes, at the present "
            f"weights, that {self.samples:,} samples show at a level of {SIGNIFICANCE:.0%}, and masks drawn at random. "
            "Nothing is said of accuracy: a criterion that knows the network may go further, and a network may need "
            "more than its signals."
        )


def safe_sparsity(
    model: nn.Module,
    data: Data | None,
    *,
    scope: Scope | None = None,
    confidence: float = 0.95,
    draws: int = 20,
    seed: int = 0,
) -> SafeSparsity:
    """Return the sparsity up to which random pruning cuts no signal of the data off; the model is left as it was.

    One pass over the data finds the inputs of each linear and convolutional layer whose means differ between classes
    (an F-test); meanwhile (classes, 4, inputs) numbers are held for each layer. Then random masks are drawn.

    Args:
        model: Any network, trained or not.
        data: Batches with one class index per sample.
        scope: Which tensors may be pruned; default: all.
        confidence: Probability that nothing is cut off, in (0, 1).
        draws: Random masks, at least 2.
        seed: Draws them.

    Raises:
        DataNeeded: No data, no labels, a single class, or too few samples.
        InvalidInputs: The model does not run on the data.
        NothingPrunable: No linear or convolutional layer is in scope.
        NotApplicable: No layer reads anything that differs between the classes.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 4))
        >>> batches = [(torch.eye(4) + 0.1 * torch.randn(4, 4), torch.arange(4)) for _ in range(25)]
        >>> [layer.signals for layer in safe_sparsity(net, batches).layers][0]
        4
    """
    layers = _layers(model, scope or Scope())
    seen = _seen(model, layers, data)
    readers = {name: _Reader(_shape(layers[name]), means.differ()) for name, means in seen.items()}
    readers = {name: reader for name, reader in readers.items() if reader.signals}
    if not readers:
        raise NotApplicable("No layer reads anything that differs between the classes. Give more samples, or train it.")
    risk, generator = 1 - confidence, generator_for("masks", seed)
    density = {name: safe_density(reader.fans(), risk / len(readers)) for name, reader in readers.items()}
    uniform = safe_density([fan for reader in readers.values() for fan in reader.fans()], risk)
    drawn = [{n: reader.first_loss(generator) for n, reader in readers.items()} for _ in range(draws)]
    weights = {name: _shape(layer).weights for name, layer in layers.items()}
    means = next(iter(seen.values()))
    return SafeSparsity(
        tuple(_report(name, _shape(layer), readers.get(name), density.get(name, 1)) for name, layer in layers.items()),
        Estimate(_sparsity(weights, density), tuple(_sparsity(weights, each) for each in drawn)),
        Estimate(
            _sparsity(weights, dict.fromkeys(density, uniform)),
            tuple(_sparsity(weights, dict.fromkeys(each, max(each.values()))) for each in drawn),
        ),
        confidence,
        means.samples,
        means.classes,
    )


def safe_density(fans: Sequence[tuple[int, int]], risk: float) -> float:
    """Return the smallest density p at which the expected number of units that are cut off is at most `risk`.

    Args:
        fans: Pairs (number of units, weights of each, at least 1): they are cut off with probability (1 - p)^weights.
        risk: At least the probability that any unit is cut off; in (0, 1).
    """

    def excess(p: float) -> float:
        return sum(count * (1 - p) ** fan for count, fan in fans) - risk

    return float(brentq(excess, 0.0, 1.0, xtol=1e-12))


# -------------------------------------------------------------------------------------------------------------- layers


class _Shape(NamedTuple):
    """The weight of a linear or convolutional layer: inputs and outputs are those of one group."""

    groups: int
    outputs: int
    inputs: int
    kernel: int

    @property
    def weights(self) -> int:
        return self.groups * self.outputs * self.inputs * self.kernel


def _layers(model: nn.Module, scope: Scope) -> dict[str, nn.Module]:
    """Return linear and convolutional layers by the names of their weights."""
    found = {
        f"{path}.weight".lstrip("."): module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_transposed(module)
    }
    found = {name: module for name, module in found.items() if scope.admits(name)}
    if not found:
        raise NothingPrunable("No linear or convolutional layer is in scope, so nothing can be said of its signals.")
    return found


def _shape(module: nn.Module) -> _Shape:
    weight: Any = module.weight
    if is_transposed(module):
        return _Shape(1, weight.shape[1], weight.shape[0], 1)
    groups: Any = getattr(module, "groups", 1)
    return _Shape(groups, weight.shape[0] // groups, weight.shape[1], math.prod(weight.shape[2:]))


@dataclass(frozen=True)
class _Reader:
    """A layer, and which of its inputs carry a signal: a bool tensor."""

    shape: _Shape
    carries: Tensor

    @property
    def signals(self) -> int:
        return int(self.carries.sum())

    def fans(self) -> list[tuple[int, int]]:
        """Return (units, weights of each) for the inputs that carry a signal, and for the outputs."""
        groups, outputs, inputs, kernel = self.shape
        return [(self.signals, outputs * kernel), (groups * outputs, inputs * kernel)]

    def first_loss(self, generator: torch.Generator) -> float:
        """Return the density below which a random mask cuts a unit off.

        Each weight gets a uniform number, and at density p those below p stay: a unit needs the smallest of its own.
        """
        u = torch.rand(self.shape, generator=generator)
        needed_to_leave = u.amin((1, 3)).flatten()[self.carries]
        needed_to_enter = u.amin((2, 3))
        return float(torch.maximum(needed_to_leave.max(), needed_to_enter.max()))


def _report(name: str, shape: _Shape, reader: _Reader | None, density: float) -> LayerSignals:
    signals = reader.signals if reader is not None else 0
    return LayerSignals(name, shape.weights, shape.groups * shape.inputs, signals, density)


def _sparsity(weights: Mapping[str, int], density: Mapping[str, float]) -> float:
    """Return the share of all weights that is gone at these densities; layers that are not named are dense."""
    return sum((1 - density[name]) * weights[name] for name in density) / sum(weights.values())


# ------------------------------------------------------------------------------------------------------------- signals


class _ClassMeans:
    """The analysis of variance of many quantities between classes, batch by batch.

    Attributes:
        samples: How many were added.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._counts = torch.zeros(0, dtype=torch.float64)
        self._origin = self._sums = self._squares = torch.zeros(0, dtype=torch.float64)

    @property
    def classes(self) -> int:
        """How many classes have samples."""
        return int((self._counts > 0).sum())

    def add(self, values: Tensor, labels: Tensor) -> None:
        """Take in values (samples, places, channels) of samples with these class indices (samples,)."""
        values = values.double().cpu()
        if not self.samples:
            self._origin = values.mean(0)
            self._sums, self._squares = (
                torch.zeros(0, *values.shape[1:]).double(),
                torch.zeros(values.shape[1:]).double(),
            )
        values = values - self._origin  # so that little is lost in the difference of squares
        more = max(0, int(labels.max()) + 1 - len(self._counts))
        self._counts = F.pad(self._counts, (0, more)) + torch.bincount(labels, minlength=len(self._counts) + more)
        self._sums = F.pad(self._sums, (0, 0, 0, 0, 0, more)).index_add(0, labels, values)
        self._squares += values.square().sum(0)
        self.samples += len(labels)

    def differ(self) -> Tensor:
        """Return for each channel whether its mean differs between classes at one of its places at least: an F-test."""
        present = self._counts > 0
        counts, sums = self._counts[present][:, None, None], self._sums[present]
        between = (sums.square() / counts).sum(0) - sums.sum(0).square() / self.samples
        within = self._squares - (sums.square() / counts).sum(0)
        rounding = 1e-12 * (self._squares + self.samples * self._origin.square())
        free = (len(counts) - 1, self.samples - len(counts))
        ratio = (between / free[0]) / (within.clamp_min(rounding).clamp_min(1e-300) / free[1])
        p = torch.from_numpy(stats.f.sf(ratio.numpy(), *free))
        return ((p < SIGNIFICANCE / p.numel()) & (between > rounding)).any(0)


def _seen(model: nn.Module, layers: Mapping[str, nn.Module], data: Data | None) -> dict[str, _ClassMeans]:
    """Return the class means of each layer's input; layers that no sample reaches are left out."""
    if data is None:
        raise DataNeeded(
            "Which units carry a signal shows in data only, and none were given: pass batches with labels."
        )
    means: dict[str, _ClassMeans] = {}
    labels = torch.zeros(0, dtype=torch.long)

    def listener(name: str) -> Any:
        return lambda module, inputs: means.setdefault(name, _ClassMeans()).add(
            _places(name, module, inputs[0], len(labels)), labels
        )

    with ExitStack() as stack, undisturbed(model):
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(listener(name)).remove)
        for batch in data:
            args, kwargs, target = split_batch(to_model(batch, model))
            labels = _labels(target)
            try:
                model(*args, **kwargs)
            except SecateurError:
                raise
            except Exception as error:
                raise InvalidInputs(f"The model does not run on the data: {type(error).__name__}: {error}") from error
    found = next(iter(means.values()), _ClassMeans())
    if found.classes < 2 or found.samples < 2 * found.classes:
        raise DataNeeded(
            f"Signals are differences between classes: at least two classes with two samples each are needed; got "
            f"{found.samples} samples of {found.classes} classes."
        )
    return means


def _labels(target: Any) -> Tensor:
    _, labels = logits_and_labels(None, target)
    if labels.dim() != 1 or labels.is_floating_point() or bool((labels < 0).any()):
        raise DataNeeded(
            "Signals are differences between classes: each batch must come with one class index per sample; got labels "
            f"of shape {tuple(labels.shape)} and type {labels.dtype}."
        )
    return labels.long().cpu()


def _places(name: str, module: nn.Module, x: Tensor, samples: int) -> Tensor:
    """Return a layer's input as (samples, places, channels), means over stretches of its positions."""
    rows = x.movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else x
    if rows.dim() < 2 or rows.shape[0] % samples:
        raise NotApplicable(f"The first dim of what {name!r} reads is not that of samples: leave it out of the scope.")
    columns = rows.reshape(samples, -1, rows.shape[-1]).mT
    return F.adaptive_avg_pool1d(columns, min(PLACES, columns.shape[-1])).mT
