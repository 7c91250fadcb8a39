"""Whether a network is wide enough for gradient descent to reach a target, estimated before it is trained.

With J the Jacobian of the outputs by the weights, the squared error falls exponentially as long as the smallest
singular value of J stays away from zero. The condition is derived from the argument of Buskulic, Quéau, Fadili:
Convergence Guarantees of Overparametrized Wide Deep Inverse Prior, SSVM 2023 (arXiv 2303.11265). It asks for a bound
on how fast J changes; here that is estimated from below, along a few directions, so nothing is proved.

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

SHARES = (0.1, 0.5, 1.0)
"""Of the way that the weights can go under the condition, 2 residual / smallest, at which the descent is looked at.

If the Jacobian has changed by more than smallest / 2 at its end, the ratio is above 1.
"""

TOLERANCE = 1e-3
"""Relative error of an eigenvalue of J Jᵀ at which Lanczos's method stops."""

FEWEST_PRODUCTS, MOST_PRODUCTS = 20, 500
"""With J Jᵀ for one eigenvalue; a start may all but miss its vector, and then an early stop would be at another one."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Trainability:
    """What can be said about a network before it is trained on a target.

    Attributes:
        smallest: Smallest singular value of the Jacobian of the outputs by the weights; 0 if the weights are fewer.
        residual: Norm of output minus target.
        curvature: Largest change of the Jacobian per distance in the weights, over random directions and that of
            steepest descent: an estimate, from below, of its Lipschitz constant.
    """

    smallest: float
    residual: float
    curvature: float

    @property
    def ratio(self) -> float:
        """4 residual curvature / smallest². Below 1 the condition holds; infinite if smallest is 0."""
        return 4 * self.residual * self.curvature / self.smallest**2 if self.smallest else math.inf

    @property
    def holds(self) -> bool:
        """Whether the ratio is below 1; by an estimate of the curvature, so that it is no proof."""
        return self.ratio < 1

    @property
    def rate(self) -> float:
        """Exponent of the slowest fall of the loss in continuous time if the curvature is right: smallest² / 2."""
        return self.smallest**2 / 2

    @property
    def verdict(self) -> str:
        """What this means, in words."""
        if self.holds:
            return (
                f"The condition holds (ratio {self.ratio:.2g}), by an estimate of the curvature from below, so this is "
                "no proof: under gradient descent with small steps the squared error should fall at least as fast as "
                f"exp(-{self.rate:.2g} t)."
            )
        return (
            f"The condition does not hold (ratio {self.ratio:.2g}, must be below 1): nothing is known, and training "
            "may still succeed. Wider layers, more kept weights, or fewer samples lower the ratio."
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
    """Estimate whether a network is wide enough for gradient descent to reach a target, before training it.

    The loss is half the squared distance of the output to the target, over all samples together. Trained are the
    parameters that require gradients. The network is run in float64, in the mode (training or evaluation) that it is
    in, and left as it was. The condition would be sufficient with the true curvature; here that is estimated
    from below, by steps of 0.001 in random directions, and along the steepest descent as far as the theory lets the
    weights move. The theory is one of smooth activations.

    Args:
        model: At its initial weights.
        example_inputs: Samples: a tensor, a tuple of positional or a mapping of keyword arguments.
        target: What the output should become; of the same shape.
        masks: Which weights are kept, by name; those that are not named are trained whole.
        directions: Random directions in which the change of the Jacobian is measured.
        seed: Draws them, and what the model itself draws.

    Raises:
        InvalidInputs: Fewer than one direction, an output that is not a tensor, a target of another shape, or NaN or
            infinity in output or target.
        NothingPrunable: No parameter requires gradients.
        PlanMismatch: A mask without a parameter of its shape.
        NotApplicable: Too many outputs to find the smallest singular value, or a Jacobian with NaN or infinity.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2000), nn.Tanh(), nn.Linear(2000, 1))
        >>> trainability(net, torch.randn(3, 4), torch.zeros(3, 1)).smallest > 0
        True
    """
    if directions < 1:
        raise InvalidInputs(f"directions must be at least 1; got {directions}.")
    network = _Network(model, example_inputs, masks or {}, seed_for("model", seed))
    generator = generator_for("directions", seed)
    with torch.no_grad():
        output = network.output(network.start)
        residual, here = output - _like(target, output), network.jacobian(network.start)
        if not residual.isfinite().all():
            raise InvalidInputs("The output or the target has NaN or infinity. Check inputs, weights and target.")

        def random(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)

        def change(ray: Weights, distance: float) -> float:
            size = distance / _norm(ray)
            there = network.jacobian({name: weight + size * ray[name] for name, weight in network.start.items()})
            return _singular_value(there - here, random, residual, largest=True) / distance

        enough = residual.numel() <= sum(int(kept.sum()) for kept in network.kept.values())
        smallest = _singular_value(here, random, residual, largest=False) if enough else 0.0
        rays = [{name: random(w) * network.kept[name] for name, w in network.start.items()} for _ in range(directions)]
        changes = [change(ray, STEP) for ray in rays]
        if smallest and residual.any():
            descent = {name: -part for name, part in here.pull(residual).items()}
            changes += [change(descent, share * 2 * float(residual.norm()) / smallest) for share in SHARES]
        return Trainability(smallest, float(residual.norm()), max(changes))


def _norm(weights: Weights) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in weights.values()))


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
        rest |= {name: rest[name] * masks[name].to(rest[name]) for name in masks if name in rest}
        self._rest = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in rest.items()}

    def output(self, weights: Weights) -> Tensor:
        """Return the output; the same for the same weights, whatever the model draws or counts."""
        state = {name: tensor.clone() for name, tensor in self._rest.items()}
        state |= {name: weight * self.kept[name] for name, weight in weights.items()}
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
            torch.manual_seed(self._seed)
            found = torch.func.functional_call(self._model, state, self._inputs.args, dict(self._inputs.kwargs))
        output = getattr(found, "logits", found)
        if not isinstance(output, Tensor):
            raise InvalidInputs(
                f"The model returns {type(output).__name__}; a tensor, or an output with logits, is needed. "
                "Wrap the model so that it returns one tensor."
            )
        return output

    def jacobian(self, at: Weights) -> _Map:
        """Return the Jacobian of the outputs by the weights."""
        output, pulled = torch.func.vjp(self.output, at)[:2]
        # The transpose of the transpose: it asks less of a model's operations than forward derivatives do.
        pushed = torch.func.vjp(lambda v: pulled(v)[0], torch.zeros_like(output))[1]
        return _Map(lambda w: pushed(w)[0], lambda v: pulled(v)[0])


def _singular_value(matrix: _Map, random: Callable[[Tensor], Tensor], like: Tensor, *, largest: bool) -> float:
    """Return the largest or the smallest singular value of a map, by Lanczos's method on its Gram matrix.

    Each vector is made orthogonal to all before it, so that as many products as there are outputs are exact.

    Args:
        matrix: Has no more outputs than weights.
        random: Draws vectors.
        like: Of the shape of the outputs.
        largest: Or the smallest.
    """
    outputs = like.numel()
    first = random(like).flatten()
    basis = (first / first.norm())[None]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = matrix.push(matrix.pull(basis[-1].view_as(like))).flatten()
        if not image.isfinite().all():
            raise NotApplicable("The Jacobian has NaN or infinity at the start or near it. Check inputs and weights.")
        diagonal.append(float(basis[-1] @ image))
        image = _orthogonal(image, basis)
        end = len(diagonal) - 1 if largest else 0
        values, vectors = eigh_tridiagonal(diagonal, beside, select="i", select_range=(end, end))
        length, value = float(image.norm()), float(values[0])
        error, rounding = length * abs(float(vectors[-1, 0])), outputs * torch.finfo(image.dtype).eps * max(diagonal)
        found = len(basis) >= FEWEST_PRODUCTS and error <= max(TOLERANCE * value, rounding)
        if found or len(basis) == outputs:
            return math.sqrt(value) if value > max(error, rounding) else 0.0
        if len(basis) == MOST_PRODUCTS:
            raise NotApplicable(
                f"{outputs:,} outputs: {MOST_PRODUCTS} products with the Jacobian did not find its smallest "
                "singular value. Give fewer samples: where the condition fails for some of them, it fails for all."
            )
        if length <= rounding:  # nothing more can be seen from this start
            image, length = _orthogonal(random(like).flatten(), basis), 0.0
        basis = torch.cat([basis, (image / image.norm())[None]])
        beside.append(length)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):  # once is not enough in floating point
        vector = vector - basis.T @ (basis @ vector)
    return vector
