"""Wide deep inverse priors: when gradient descent on a network's weights solves an inverse problem, and what masks do.

Buskulic, Quéau, Fadili: Convergence Guarantees of Overparametrized Wide Deep Inverse Prior, SSVM 2023 (arXiv
2303.11265).
A network g(W) = V tanh(W u) / sqrt(k) of width k explains measurements y = A x: W minimizes ||A g(W) - y||² / 2. With
r the residual and J = dg/dW, the loss falls exponentially as long as the smallest singular value of J stays away from
zero, and it does if the network is wide enough. A condition derived from that argument can be estimated for any
network before it is trained, `secateur.measure.trainability`; here it is, and then the networks are trained.

As the width grows, J Jᵀ becomes a multiple c of the identity, c = E[tanh'(z)²] |u|² for a dense network, and stays as
it was at the start. Then the residual is multiplied by 1 - step c A Aᵀ at each step, which gives the number
of steps that greater widths come down to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, median_low

import torch
from torch import Tensor, nn

from secateur.measure.figures import lines_figure
from secateur.measure.report import Table
from secateur.measure.trainability import Trainability, trainability
from secateur.studies.study import Claim, Exhibit, Findings, OnProgress, Study

WIDTHS = (10, 20, 40, 80, 160, 320, 640, 1280, 2560)
DRAWS, DENSITY, STEPS, STEP, SOLVED = 10, 0.2, 4000, 0.5, 1e-7
PIXELS, MEASUREMENTS, LATENT, CONDITION = 30, 10, 20, 2.0
GRAM_WIDTH = 640
ARMS = {"dense": (1.0, 1.0), "pruned": (DENSITY, 1.0), "pruned, rescaled": (DENSITY, DENSITY**-0.5)}


class Prior(nn.Module):
    """Measurements of what a network of two layers makes of its input: u -> A V tanh(scale W u) / sqrt(k).

    Only W is trained. All tensors may have a leading dim: of several networks at once.
    """

    a: Tensor
    v: Tensor

    def __init__(self, a: Tensor, v: Tensor, w: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("v", v)
        self.w, self.scale = nn.Parameter(w), scale

    def forward(self, u: Tensor) -> Tensor:
        """(d, 1) -> (m, 1)."""
        return self.a @ (self.v @ torch.tanh(self.scale * (self.w @ u))) / math.sqrt(self.w.shape[-2])


@dataclass(frozen=True)
class Problems:
    """DRAWS inverse problems, each with a network.

    Attributes:
        net: All networks, pruned.
        mask: Which entries of W are kept.
        u: Their inputs.
        y: What they should explain.
    """

    net: Prior
    mask: Tensor
    u: Tensor
    y: Tensor

    def check(self, draw: int) -> Trainability:
        """Return what the condition says of one network."""
        own = Prior(self.net.a[draw], self.net.v[draw], self.net.w.detach()[draw], self.net.scale)
        return trainability(own, self.u[draw], self.y[draw], masks={"w": self.mask[draw]})


def problems(width: int, density: float, scale: float, seed: int) -> Problems:
    """Draw inverse problems and networks.

    Args:
        width: k.
        density: Share of the entries of W that are kept, at random.
        scale: Factor on W u, which restores its variance after pruning.
        seed: Draws problems, networks and masks.
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
    mask = torch.rand(DRAWS, width, LATENT, generator=g) < density
    return Problems(Prior(a, v, w * mask, scale), mask, u, y)


def solve(given: Problems) -> Tensor:
    """Train all networks at once by gradient descent.

    Returns:
        The loss of each after each step, until all are solved or there were STEPS: (steps + 1, DRAWS).
    """
    net, losses = given.net, []
    while True:
        own = (net(given.u) - given.y).square().sum((1, 2)) / 2
        losses.append(own.detach())
        if len(losses) > STEPS or bool((losses[-1] <= SOLVED).all()):
            return torch.stack(losses)
        (slope,) = torch.autograd.grad(own.sum(), net.w)
        with torch.no_grad():
            net.w.sub_(STEP * slope * given.mask)


def limit_steps(given: Problems, gram: float) -> list[int]:
    """Return the number of steps to a solution from the same residuals in the limit of width, by problem.

    Args:
        given: At their initial weights.
        gram: c, by which J Jᵀ is the identity in the limit.
    """
    strengths, directions = torch.linalg.eigh(given.net.a @ given.net.a.mT)
    with torch.no_grad():
        parts = (directions.mT @ (given.net(given.u) - given.y)).squeeze(2)
    times = torch.arange(STEPS + 1)[:, None, None]
    losses = (parts * (1 - STEP * gram * strengths) ** times).square().sum(2) / 2
    return [int(steps) for steps in (losses > SOLVED).sum(0)]


def mean_gram(width: int, density: float, scale: float, seed: int) -> float:
    """Return the mean of trace(J Jᵀ) / n over networks, by which the condition is scaled."""
    g = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(DRAWS, LATENT, 1, generator=g, dtype=torch.float64), dim=1)
    w = torch.randn(DRAWS, width, LATENT, generator=g, dtype=torch.float64)
    v = torch.randn(DRAWS, PIXELS, width, generator=g, dtype=torch.float64)
    mask = (torch.rand(DRAWS, width, LATENT, generator=g) < density).double() * scale
    slope = 1 - torch.tanh((w * mask) @ u).square()
    seen = (mask * u.mT).square().sum(2, keepdim=True)
    return float((v.square() @ (slope.square() * seen)).mean() / width)


@dataclass(frozen=True)
class Outcome:
    """What became of the networks of one width.

    Attributes:
        steps: Until the loss was solved, of those that were.
        ratios: Of the condition, which holds below 1, by network.
        bounds: The rate at which the loss should fall at least if it holds, by network.
        rates: The rate at which the loss fell, by network: the smallest mean over any time from the start.
    """

    steps: list[int]
    ratios: list[float]
    bounds: list[float]
    rates: list[float]

    @property
    def median(self) -> float:
        """The median number of steps; infinite if none was solved."""
        return median_low(self.steps) if self.steps else math.inf


def outcome(width: int, density: float, scale: float, seed: int) -> Outcome:
    """Check networks by the condition, train them, and say how fast their losses fell."""
    given = problems(width, density, scale, seed)
    checks = [given.check(draw) for draw in range(DRAWS)]
    steps, rates = [], []
    for losses in solve(given).T:
        solved = (losses <= SOLVED).nonzero().flatten().tolist()
        steps += solved[:1]
        until = solved[0] if solved else len(losses) - 1
        times = STEP * torch.arange(1, until + 1)
        rates.append(float(((losses[0] / losses[1 : until + 1]).log() / times).min()))
    return Outcome(steps, [c.ratio for c in checks], [c.rate for c in checks], rates)


def run(seed: int, progress: OnProgress) -> Findings:
    """Check and train networks of all widths, dense and pruned, and compare with the claims."""
    found: Found = {name: {} for name in ARMS}
    for done, (name, (density, scale)) in enumerate(ARMS.items()):
        for part, width in enumerate(WIDTHS):
            progress(f"{name}, width {width}", done * len(WIDTHS) + part, len(ARMS) * len(WIDTHS))
            found[name][width] = outcome(width, density, scale, seed)
    grams = {name: mean_gram(GRAM_WIDTH, density, scale, seed) for name, (density, scale) in ARMS.items()}
    limits = {
        name: median_low(limit_steps(problems(WIDTHS[-1], density, scale, seed), grams[name]))
        for name, (density, scale) in ARMS.items()
    }
    data = {
        "limits": limits,
        "networks": {arm: {str(width): vars(o) for width, o in own.items()} for arm, own in found.items()},
        "trace_of_gram": grams,
    }
    return Findings(_claims(found, grams, limits), _exhibits(found, limits), data)


Found = dict[str, dict[int, Outcome]]
"""By arm and width."""


PAPER, OURS = "Buskulic, Quéau, Fadili 2023, abstract", "derived; the use for pruning is ours"


def _claims(found: Found, grams: dict[str, float], limits: dict[str, int]) -> tuple[Claim, ...]:
    slack = 2  # of ten networks: a binomial error
    solved = {arm: {width: len(o.steps) for width, o in own.items()} for arm, own in found.items()}
    monotone = all(own[b] >= own[a] - slack for own in solved.values() for a, b in pairwise(WIDTHS))
    widest = WIDTHS[-1]
    bare, factor = (grams[arm] / grams["dense"] for arm in ("pruned", "pruned, rescaled"))
    return (
        Claim(
            "Wide networks are solved by gradient descent with high probability, narrow ones are not.",
            PAPER,
            f"none or few of {DRAWS} at width {WIDTHS[0]}, all at {widest}, and no fewer at greater widths",
            f"{solved['dense'][WIDTHS[0]]} and {solved['dense'][widest]}",
            monotone and solved["dense"][WIDTHS[0]] <= slack and solved["dense"][widest] == DRAWS,
        ),
        *_claims_of_the_steps(found, limits),
        Claim(
            "With the factor, the Gram matrix of the Jacobian has the size of the dense one; without, it is smaller.",
            OURS,
            "trace relative to the dense network: within 15 % with the factor, below a half without",
            f"{factor:.2f} with, {bare:.2f} without",
            abs(factor - 1) < 0.15 and bare < 0.5,
        ),
        _claim_of_the_condition(found),
    )


def _claims_of_the_steps(found: Found, limits: dict[str, int]) -> tuple[Claim, ...]:
    widest, middle = WIDTHS[-1], DENSITY**-0.5
    falling = [o.median for o in found["dense"].values() if len(o.steps) == DRAWS]
    at_widest = {arm: own[widest].median for arm, own in found.items()}
    near = {arm: at_widest[arm] / limit for arm, limit in limits.items()}
    spread = 2 * math.sqrt(MEASUREMENTS / widest)
    slower, mended = (at_widest[arm] / at_widest["dense"] for arm in ("pruned", "pruned, rescaled"))
    slower_limit, mended_limit = (limits[arm] / limits["dense"] for arm in ("pruned", "pruned, rescaled"))
    return (
        Claim(
            "Wider networks are solved in fewer steps.",
            PAPER,
            "the median number of steps falls from each width to the next where all are solved",
            ", ".join(f"{steps:.0f}" for steps in falling) or "no width at which all are solved",
            len(falling) > 1 and all(a > b for a, b in pairwise(falling)),
        ),
        Claim(
            "The number of steps comes down to that of infinite width, where J Jᵀ is a multiple of the identity.",
            "derived",
            f"median steps at width {widest} relative to the limit's ({', '.join(map(str, limits.values()))} for "
            f"{'; '.join(limits)}): 1 ± {spread:.2f}, the spread 2 sqrt({MEASUREMENTS} / {widest}) "
            "of the eigenvalues of J Jᵀ",
            ", ".join(f"{ratio:.2f}" for ratio in near.values()),
            all(abs(ratio - 1) <= spread for ratio in near.values()),
        ),
        Claim(
            f"A random mask of density {DENSITY} slows the descent down; the factor p^-1/2 makes up for most of it.",
            OURS,
            f"steps at the greatest width, relative to the dense network: above p^-1/2 = {middle:.2f} without the "
            f"factor and below with it; in the limit {slower_limit:.2f} and {mended_limit:.2f}",
            f"{slower:.2f} and {mended:.2f}",
            slower > middle > mended,
        ),
    )


def _claim_of_the_condition(found: Found) -> Claim:
    promised = [
        rate / bound
        for own in found.values()
        for o in own.values()
        for ratio, bound, rate in zip(o.ratios, o.bounds, o.rates, strict=True)
        if ratio < 1
    ]
    return Claim(
        "Where the condition that is estimated beforehand holds, the loss falls at least at the rate of the bound.",
        "derived from the proof of Buskulic, Quéau, Fadili 2023",
        f"rate found / rate of the bound at least 1 for each network of ratio below 1 of {3 * len(WIDTHS) * DRAWS}",
        f"at least {min(promised, default=math.nan):.2f} for {len(promised)} networks",
        min(promised, default=0.0) >= 1,
    )


def _exhibits(found: Found, limits: dict[str, int]) -> tuple[Exhibit, ...]:
    about = (
        f"{DRAWS} networks each; {PIXELS} unknowns, {MEASUREMENTS} measurements of condition {CONDITION:g}, tanh, "
        f"gradient descent with step {STEP}, solved at a loss of {SOLVED:g} within {STEPS} steps. Pruned: random masks "
        f"of density {DENSITY}; rescaled: with the factor p^-1/2."
    )
    shares = {arm: [(w, 100 * len(o.steps) / DRAWS) for w, o in own.items()] for arm, own in found.items()}
    times: dict[str, list[tuple[float, float]]] = {
        arm: [(w, o.median) for w, o in own.items() if o.steps] for arm, own in found.items()
    }
    times |= {f"{arm}, limit": [(w, limit) for w in (WIDTHS[0], WIDTHS[-1])] for arm, limit in limits.items()}
    ratios = {
        arm: [(w, median(o.ratios)) for w, o in own.items() if math.isfinite(median(o.ratios))]
        for arm, own in found.items()
    }
    ratios["limit of the condition"] = [(w, 1.0) for w in (WIDTHS[0], WIDTHS[-1])]
    faster = {
        arm: [
            (w, median(rate / bound for rate, bound in zip(o.rates, o.bounds, strict=True) if bound))
            for w, o in own.items()
            if any(o.bounds)
        ]
        for arm, own in found.items()
    }
    faster["bound"] = ratios["limit of the condition"]
    rows = [
        (arm, *(f"{len(o.steps)}" + (f"; {o.median:.0f}" if o.steps else "") for o in own.values()))
        for arm, own in found.items()
    ]
    head = ("solved of 10; median steps", *(f"k = {w}" for w in WIDTHS))
    x_title = "width k (log scale)"
    return (
        Exhibit(
            "Probability of convergence", about, lines_figure(shares, x_title, "solved (%)", log_x=True), claims=(0,)
        ),
        Exhibit(
            "Steps to convergence",
            "Of those that are solved. " + about,
            lines_figure(times, x_title, "median steps (log scale)", log_x=True, log_y=True),
            claims=(1, 2, 3),
        ),
        Exhibit(
            "The condition, before training",
            "4 residual curvature / smallest singular value²: it holds below 1. Medians, if finite. " + about,
            lines_figure(ratios, x_title, "ratio of the condition (log scale)", log_x=True, log_y=True),
            claims=(5,),
        ),
        Exhibit(
            "The rate of descent and its bound",
            "The smallest mean rate at which the loss fell over any time from the start. Medians, where the bound is "
            "not 0; it is expected only where the condition holds. " + about,
            lines_figure(faster, x_title, "rate found / rate of the bound (log scale)", log_x=True, log_y=True),
            claims=(5,),
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
