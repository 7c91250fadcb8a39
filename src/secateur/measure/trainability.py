"""Whether a network is wide enough for gradient descent to reach a target, checked before it is trained.

With J the Jacobian of the outputs by the weights, the squared error falls exponentially as long as the smallest
singular value of J stays away from zero. The condition is derived from the argument of Buskulic, Quéau, Fadili:
Convergence Guarantees of Overparametrized Wide Deep Inverse Prior, SSVM 2023 (arXiv 2303.11265).

J has a row per output and a column per weight and is never formed: Lanczos's method needs products with J and its
transpose only, which cost a few passes each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.core.masks import Masks
from secateur.core.randomness import generator_for, seed_for
from secateur.errors import InvalidInputs, NotApplicable, NothingPrunable
from secateur.structure.inputs import as_inputs

STEP = 1e-3
"""How far the weights are moved to see the Jacobian change."""

TOLERANCE = 1e-3
"""Relative error of an eigenvalue of J Jᵀ at which Lanczos's method stops."""

MOST_PRODUCTS = 500
"""With J Jᵀ for one eigenvalue."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Trainability:
    """What can be said about a network before it is trained on a target.

    Attributes:
        smallest: Smallest singular value of the Jacobian of the outputs by the weights; 0 if the weights are fewer.
        residual: Norm of output minus target.
        curvature: Largest change of the Jacobian per distance in the weights, over random directions: an estimate,
            from below, of its Lipschitz constant.
    """

    smallest: float
    residual: float
    curvature: float

    @property
    def ratio(self) -> float:
        """4 residual curvature / smallest². Below 1 the sufficient condition holds; infinite if smallest is 0."""
        return 4 * self.residual * self.curvature / self.smallest**2 if self.smallest else math.inf

    @property
    def holds(self) -> bool:
        """Whether the sufficient condition holds: the loss is bound to fall exponentially."""
        return self.ratio < 1

    @property
    def rate(self) -> float:
        """The exponent at which the loss is bound to fall in continuous time if the condition holds: smallest² / 2."""
        return self.smallest**2 / 2

    @property
    def verdict(self) -> str:
        """What this means, in words."""
        if self.holds:
            return (
                f"The condition holds (ratio {self.ratio:.2g}): under gradient descent with small steps the squared "
                f"error falls at least as fast as exp(-{self.rate:.2g} t)."
            )
        return (
            f"The condition does not hold (ratio {self.ratio:.2g}, must be below 1): nothing is promised, although "
            "training may succeed. Wider layers, more kept weights, or fewer samples lower the ratio."
        )


def trainability(
    model: nn.Module,
    example_inputs: Any,
    target: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    directions: int = 4,
    seed: int = 0,
) -> Trainability:
    """Return whether a network is wide enough for gradient descent to reach a target, before training it.

    The loss is half the squared distance of the output to the target, over all samples together. Trained are the
    parameters that require gradients. The network is run in float64, in the mode (training or evaluation) that it is
    in, and left as it was. The theory is one of smooth activations: with ReLU the curvature is that of steps of 0.001.

    Args:
        model: At its initial weights.
        example_inputs: Samples: a tensor, a tuple of positional or a mapping of keyword arguments.
        target: What the output should become; of the same shape.
        masks: Which weights are kept, by name; those that are not named are trained whole.
        directions: Random directions in which the change of the Jacobian is measured.
        seed: Draws them, and what the model itself draws.

    Raises:
        InvalidInputs: The target has another shape than the output.
        NothingPrunable: No parameter requires gradients.
        PlanMismatch: A mask without a parameter of its shape.
        NotApplicable: Too many outputs to find the smallest singular value.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2000), nn.Tanh(), nn.Linear(2000, 1))
        >>> trainability(net, torch.randn(3, 4), torch.zeros(3, 1)).smallest > 0
        True
    """
    network = _Network(model, example_inputs, masks or {}, seed_for("model", seed))
    generator = generator_for("directions", seed)
    with torch.no_grad():
        residual = network.output(network.start) - _like(target, network.output(network.start))

        def random(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

        here, curvature = network.jacobian(network.start), 0.0
        for _ in range(directions):
            ray = {name: random(weight) * network.kept[name] for name, weight in network.start.items()}
            size = STEP / math.sqrt(sum(float(part.square().sum()) for part in ray.values()))
            there = network.jacobian({name: weight + size * ray[name] for name, weight in network.start.items()})
            curvature = max(curvature, _singular_value(there - here, random(residual), largest=True) / STEP)
        enough = residual.numel() <= sum(int(kept.sum()) for kept in network.kept.values())
        smallest = _singular_value(here, random(residual), largest=False) if enough else 0.0
        return Trainability(smallest, float(residual.norm()), curvature)


def _like(target: Tensor, output: Tensor) -> Tensor:
    if target.shape != output.shape:
        raise InvalidInputs(
            f"The target has the shape {tuple(target.shape)}, the output {tuple(output.shape)}; they must be equal. "
            "For class indices pass torch.nn.functional.one_hot(labels, classes)."
        )
    return target.detach().to(output)


@dataclass(frozen=True)
class _Map:
    """A linear map from weights to outputs, as products: with it (`push`) and with its transpose (`pull`)."""

    push: Callable[[Weights], Tensor]
    pull: Callable[[Tensor], Weights]

    def __sub__(self, other: _Map) -> _Map:
        def pull(v: Tensor) -> Weights:
            subtracted = other.pull(v)
            return {name: part - subtracted[name] for name, part in self.pull(v).items()}

        return _Map(lambda w: self.push(w) - other.push(w), pull)


class _Network:
    """A model as a function of its weights, in float64.

    Attributes:
        start: The weights, by name.
        kept: 0 where a weight is pruned, 1 elsewhere; all of the same shapes.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, masks: Mapping[str, Tensor], seed: int) -> None:
        Masks(model, masks)  # says which mask does not fit
        self._model, self._inputs, self._seed = model, as_inputs(example_inputs).to(torch.float64), seed
        parameters = dict(model.named_parameters())
        self.start = {name: p.detach().double() for name, p in parameters.items() if p.requires_grad}
        if not self.start:
            raise NothingPrunable("No parameter requires gradients, so nothing would be trained.")
        self.kept = {n: masks[n].to(w) if n in masks else torch.ones_like(w) for n, w in self.start.items()}
        rest = {name: p.detach() for name, p in parameters.items() if not p.requires_grad} | dict(model.named_buffers())
        self._rest = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in rest.items()}

    def output(self, weights: Weights) -> Tensor:
        """Return the output; the same for the same weights, whatever the model draws or counts."""
        state = {name: tensor.clone() for name, tensor in self._rest.items()}
        state |= {name: weight * self.kept[name] for name, weight in weights.items()}
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            torch.manual_seed(self._seed)
            found = torch.func.functional_call(self._model, state, self._inputs.args, dict(self._inputs.kwargs))
        output: Tensor = getattr(found, "logits", found)
        return output

    def jacobian(self, at: Weights) -> _Map:
        """Return the Jacobian of the outputs by the weights."""
        output, pulled = torch.func.vjp(self.output, at)[:2]
        # The transpose of the transpose: it asks less of a model's operations than forward derivatives do.
        pushed = torch.func.vjp(lambda v: pulled(v)[0], torch.zeros_like(output))[1]
        return _Map(lambda w: pushed(w)[0], lambda v: pulled(v)[0])


def _singular_value(matrix: _Map, first: Tensor, *, largest: bool) -> float:
    """Return the largest or the smallest singular value of a map, by Lanczos's method on its Gram matrix.

    Each vector is made orthogonal to all before it, so that as many products as there are outputs are exact.

    Args:
        matrix: Has no more outputs than weights.
        first: Random, of the shape of the outputs.
        largest: Or the smallest.
    """
    basis = (first / first.norm()).flatten()[None]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = matrix.push(matrix.pull(basis[-1].view_as(first))).flatten()
        diagonal.append(float(basis[-1] @ image))
        for _ in range(2):  # once is not enough in floating point
            image = image - basis.T @ (basis @ image)
        end = len(diagonal) - 1 if largest else 0
        values, vectors = eigh_tridiagonal(diagonal, beside, select="i", select_range=(end, end))
        length, value = float(image.norm()), float(values[0])
        error = length * abs(float(vectors[-1, 0]))
        if error <= max(TOLERANCE * value, 1e-14 * max(diagonal)) or len(basis) == len(image):
            return math.sqrt(max(value, 0.0))
        if len(basis) == MOST_PRODUCTS:
            raise NotApplicable(
                f"{first.numel():,} outputs: {MOST_PRODUCTS} products with the Jacobian did not find its smallest "
                "singular value. Give fewer samples: where the condition fails for some of them, it fails for all."
            )
        basis = torch.cat([basis, (image / length)[None]])
        beside.append(length)
