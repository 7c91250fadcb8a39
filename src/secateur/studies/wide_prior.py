"""Wide deep inverse priors: when gradient descent on a network's weights solves an inverse problem, and what masks do.

Buskulic, Quéau, Fadili: Convergence Guarantees of Overparametrized Wide Deep Inverse Prior, SSVM 2023 (arXiv
2303.11265).
A network g(W) = V tanh(W u) / sqrt(k) of width k explains measurements y = A x: W minimizes ||A g(W) - y||² / 2. With
r the residual and J = dg/dW, the loss falls exponentially as long as the smallest singular value of J stays away from
zero, and it does if the network is wide enough. A condition derived from that argument can be worked out for any
network before it is trained: `secateur.measure.trainability`.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from secateur.measure.figures import lines_figure
from secateur.measure.report import Table
from secateur.measure.trainability import trainability as trainability
from secateur.studies.study import Claim, Exhibit, Findings, OnProgress, Study

WIDTHS = (10, 20, 40, 80, 160, 320, 640)
DRAWS, DENSITY, STEPS, STEP, SOLVED = 10, 0.2, 4000, 0.5, 1e-7
PIXELS, MEASUREMENTS, LATENT, CONDITION = 30, 10, 20, 2.0
ARMS = {"dense": (1.0, 1.0), "pruned": (DENSITY, 1.0), "pruned, rescaled": (DENSITY, DENSITY**-0.5)}


def solve(width: int, density: float, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Train DRAWS networks at once by gradient descent.

    Args:
        width: k.
        density: Share of the entries of W that are kept, at random.
        scale: Factor on W u, which restores its variance after pruning.
        seed: Draws problems and networks.

    Returns:
        For each network its final loss, and the steps it took until the loss was solved (STEPS if it never was).
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(DRAWS, *shape, generator=g, dtype=torch.float64)

    u = torch.nn.functional.normalize(normal(LATENT, 1), dim=1)
    left, _, right = torch.linalg.svd(normal(MEASUREMENTS, PIXELS), full_matrices=False)
    spectrum = torch.linspace(1.0, 1 / CONDITION, MEASUREMENTS, dtype=torch.float64)
    a = left * spectrum @ right
    y = a @ normal(PIXELS, 1)
    v, w = normal(PIXELS, width), normal(width, LATENT)
    mask = scale * (torch.rand(DRAWS, width, LATENT, generator=g) < density).double()
    steps = torch.full((DRAWS,), STEPS)
    for step in range(STEPS):
        hidden = torch.tanh((w * mask) @ u)
        residual = a @ (v @ hidden) / math.sqrt(width) - y
        loss = residual.square().sum((1, 2)) / 2
        steps = torch.where((loss <= SOLVED) & (steps == STEPS), step, steps)
        if bool((loss <= SOLVED).all()):
            break
        back = (v.mT @ (a.mT @ residual)) / math.sqrt(width) * (1 - hidden.square())
        w = w - STEP * (back @ u.mT) * mask
    return loss, steps


def mean_gram(width: int, density: float, seed: int) -> float:
    """Return the mean of trace(J Jᵀ) / n over networks, by which the condition is scaled."""
    g = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(DRAWS, LATENT, 1, generator=g, dtype=torch.float64), dim=1)
    w = torch.randn(DRAWS, width, LATENT, generator=g, dtype=torch.float64)
    v = torch.randn(DRAWS, PIXELS, width, generator=g, dtype=torch.float64)
    mask = (torch.rand(DRAWS, width, LATENT, generator=g) < density).double() * density**-0.5
    slope = 1 - torch.tanh((w * mask) @ u).square()
    seen = (mask * u.mT).square().sum(2, keepdim=True)
    return float((v.square() @ (slope.square() * seen)).mean() / width)


def run(seed: int, progress: OnProgress) -> Findings:
    """Train networks of all widths, dense and pruned, and compare with the claims."""
    solved: dict[str, dict[int, int]] = {name: {} for name in ARMS}
    median: dict[str, dict[int, float]] = {name: {} for name in ARMS}
    done = 0
    for name, (density, scale) in ARMS.items():
        for width in WIDTHS:
            progress(f"{name}, width {width}", done, len(ARMS) * len(WIDTHS))
            _, steps = solve(width, density, scale, 1000 * seed + width)
            reached = steps[steps < STEPS]
            solved[name][width] = len(reached)
            median[name][width] = float(reached.median()) if len(reached) else math.inf
            done += 1
    grams = {name: mean_gram(WIDTHS[-1], density, seed) for name, (density, _) in ARMS.items()}
    finite = {arm: {str(k): v for k, v in found.items() if v < math.inf} for arm, found in median.items()}
    data = {"solved_of_10": solved, "median_steps": finite, "trace_of_gram": grams}
    return Findings(_claims(solved, median, grams), _exhibits(solved, median), data)


def _claims(
    solved: dict[str, dict[int, int]], median: dict[str, dict[int, float]], grams: dict[str, float]
) -> tuple[Claim, ...]:
    paper, ours = "Buskulic, Quéau, Fadili 2023, abstract", "derived; the use for pruning is ours"
    slack = 2  # of ten networks: a binomial error
    monotone = all(found[b] >= found[a] - slack for found in solved.values() for a, b in pairwise(WIDTHS))
    widest, middle = WIDTHS[-1], DENSITY**-0.5
    slower, mended = (median[arm][widest] / median["dense"][widest] for arm in ("pruned", "pruned, rescaled"))
    return (
        Claim(
            "Wide networks are solved by gradient descent with high probability, narrow ones are not.",
            paper,
            f"none or few of {DRAWS} at width {WIDTHS[0]}, all at {widest}, and no fewer at greater widths",
            f"{solved['dense'][WIDTHS[0]]} and {solved['dense'][widest]}",
            monotone and solved["dense"][WIDTHS[0]] <= slack and solved["dense"][widest] == DRAWS,
        ),
        Claim(
            "Wider networks are solved in fewer steps.",
            paper,
            "the median number of steps falls from each width to the next where all are solved",
            " > ".join(f"{median['dense'][w]:.0f}" for w in WIDTHS if solved["dense"][w] == DRAWS),
            _falling([median["dense"][w] for w in WIDTHS if solved["dense"][w] == DRAWS]),
        ),
        Claim(
            f"A random mask of density {DENSITY} slows the descent down; the factor p^-1/2 makes up for most of it.",
            ours,
            f"steps at the greatest width, relative to the dense network: 1/p = {1 / DENSITY:g} without and 1 with the "
            f"factor in the limit; judged by the middle, {middle:.2f}",
            f"{slower:.2f} and {mended:.2f}",
            slower > middle > mended,
        ),
        Claim(
            "With the factor, the Gram matrix of the Jacobian has the size of the dense one.",
            ours,
            "trace relative to the dense network within 15 %",
            f"{grams['pruned'] / grams['dense']:.2f}",
            abs(grams["pruned"] / grams["dense"] - 1) < 0.15,
        ),
    )


def _falling(values: list[float]) -> bool:
    return all(a >= b for a, b in pairwise(values))


def _exhibits(solved: dict[str, dict[int, int]], median: dict[str, dict[int, float]]) -> tuple[Exhibit, ...]:
    about = (
        f"{DRAWS} networks each; {PIXELS} unknowns, {MEASUREMENTS} measurements of condition {CONDITION:g}, tanh, "
        f"gradient descent with step {STEP}, solved at a loss of {SOLVED:g} within {STEPS} steps."
    )
    shares = {arm: [(float(w), 100 * n / DRAWS) for w, n in found.items()] for arm, found in solved.items()}
    times = {arm: [(float(w), s) for w, s in found.items() if s < math.inf] for arm, found in median.items()}
    rows = [
        (
            arm,
            *(f"{solved[arm][w]}" + (f"; {median[arm][w]:.0f}" if median[arm][w] < math.inf else "") for w in WIDTHS),
        )
        for arm in ARMS
    ]
    head = ("solved of 10; median steps", *(f"k = {w}" for w in WIDTHS))
    x_title = "width k (log scale)"
    return (
        Exhibit("Probability of convergence", about, figure=lines_figure(shares, x_title, "solved (%)", log_x=True)),
        Exhibit(
            "Steps to convergence",
            "Of those that are solved. " + about,
            figure=lines_figure(times, x_title, "median steps (log scale)", log_x=True, log_y=True),
        ),
        Exhibit("All figures", about, table=Table(head, rows)),
    )


STUDY = Study(
    name="wide-prior",
    title="Wide deep inverse priors, dense and pruned",
    question="How wide must an untrained network be to solve an inverse problem, and what does a random mask change?",
    source="Buskulic, Quéau, Fadili: Convergence Guarantees of Overparametrized Wide Deep Inverse Prior, SSVM 2023",
    run=run,
)
