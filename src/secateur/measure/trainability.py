"""Whether a network is wide enough for gradient descent to reach a target, checked before it is trained.

With J the Jacobian of the outputs by the parameters, the squared error falls exponentially as long as the smallest
singular value of J stays away from zero. The condition is derived from the argument of Buskulic, Quéau, Fadili:
Convergence Guarantees of Overparametrized Wide Deep Inverse Prior, SSVM 2023 (arXiv 2303.11265).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.randomness import generator_for


@dataclass(frozen=True)
class Trainability:
    """What can be said about a network before it is trained on a target.

    Attributes:
        smallest: Smallest singular value of the Jacobian of the outputs by the parameters; 0 if these are fewer.
        residual: Norm of output minus target.
        curvature: Largest change of the Jacobian per distance in the parameters, over random directions: an estimate,
            from below, of its Lipschitz constant.
        ratio: 4 residual curvature / smallest². Below 1 the sufficient condition holds: the loss falls exponentially.
    """

    smallest: float
    residual: float
    curvature: float

    @property
    def ratio(self) -> float:
        """4 residual curvature / smallest², which is sufficient below 1."""
        return 4 * self.residual * self.curvature / max(self.smallest**2, 1e-300)

    @property
    def rate(self) -> float:
        """The exponent at which the loss is bound to fall in continuous time if the condition holds: smallest² / 2."""
        return self.smallest**2 / 2


def trainability(
    outputs: Callable[[Mapping[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    target: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    directions: int = 4,
    seed: int = 0,
) -> Trainability:
    """Return whether a network is wide enough for gradient descent to reach a target, before training it.

    Args:
        outputs: (parameters) -> output of any shape, for example ``lambda p: torch.func.functional_call(net, p, x)``.
        parameters: Where training begins.
        target: What the output should become; of the same shape.
        masks: Which entries are kept, by name; those that are not named are trained whole.
        directions: Random directions in which the change of the Jacobian is measured.
        seed: Draws them.
    """
    generator = generator_for("directions", seed)

    def jacobian(at: Mapping[str, Tensor]) -> Tensor:
        found = torch.func.jacrev(outputs)(dict(at))
        columns = [
            (part * masks[name] if masks and name in masks else part).reshape(target.numel(), -1)
            for name, part in found.items()
        ]
        return torch.cat(columns, 1).detach()

    first = jacobian(parameters)
    residual = float((outputs(parameters) - target).detach().norm())
    steepest = 0.0
    for _ in range(directions):
        step = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for n, p in parameters.items()}
        step = {n: s * masks[n] if masks and n in masks else s for n, s in step.items()}
        length = math.sqrt(sum(float(s.square().sum()) for s in step.values()))
        size = 1e-3
        moved = jacobian({n: p + size / length * step[n] for n, p in parameters.items()})
        steepest = max(steepest, float(torch.linalg.matrix_norm(moved - first, 2)) / size)
    smallest = float(torch.linalg.svdvals(first)[-1]) if first.shape[0] <= first.shape[1] else 0.0
    return Trainability(smallest, residual, steepest)
