"""Photographs restored by untrained convolutional networks, dense and pruned: wide deep inverse priors at work.

A network with random weights is fitted to one damaged picture; it takes in what pictures have in common long before it
takes in noise (Ulyanov, Vedaldi, Lempitsky: Deep Image Prior, CVPR 2018). Why descent gets there is what Buskulic,
Quéau, Fadili show for wide networks of two layers (SSVM 2023, arXiv 2303.11265; `secateur.studies.wide_prior`): it goes
at the rate of the Gram matrix J Jᵀ of the Jacobian. A random mask of density p takes a part of each layer's signal
away, and the factor p^-1/2 on the layer gives it back, so that the pruned network should restore as the dense one does.

Descent has momentum (for inertia, see arXiv 2506.02986), and a step that the dense network's largest eigenvalue
allows. It may stop where the residual is that of the noise (the discrepancy principle).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.measure.figures import lines_figure, pictures_figure
from secateur.measure.report import Table
from secateur.optional import optional_import
from secateur.studies.study import Claim, Exhibit, Findings, OnProgress, Study

PHOTOGRAPHS = {"astronaut": (0, 120, 256), "coffee": (60, 150, 300)}
"""Pictures that scikit-image brings: top, left, and side of the square that is taken."""

SIZE, WIDTH, LAYERS = 64, 64, 4
NOISE, SEEN = 0.1, 0.25
DENSITIES, JUDGED = (0.2, 0.05, 0.01), 0.2
STEPS, EVERY, MOMENTUM = 300, 10, 0.98
SPEED = 0.5
"""The step times the largest eigenvalue of the dense network. With momentum, 4 is the limit of a linear problem."""

SAFETY = 1.1
"""Descent may stop at so many times the noise: Morozov's principle, with the usual margin."""

WIDTHS_OF_FILTER = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.3, 1.7)


@dataclass(frozen=True)
class Problem:
    """A damaged picture.

    Attributes:
        picture: The true one: (3, SIZE, SIZE), in [0, 1].
        data: What is given, of the same shape; where nothing is seen, the mean color of the rest.
        seen: Which pixels are given: (1, SIZE, SIZE), 0 or 1.
    """

    picture: Tensor
    data: Tensor
    seen: Tensor

    def residual(self, output: Tensor) -> float:
        """Return the root mean square of output minus data over what is seen."""
        difference = (output - self.data) * self.seen
        return math.sqrt(float(difference.square().sum() / (3 * self.seen.sum())))

    def restored(self, output: Tensor) -> Tensor:
        """Return a network's output as a picture; pixels that are given without noise are taken over."""
        return (output if bool(self.seen.all()) else torch.where(self.seen > 0, self.data, output)).clamp(0, 1)

    def psnr(self, restored: Tensor) -> float:
        """Return the peak signal-to-noise ratio of a picture, in dB."""
        return -10 * math.log10(float((restored - self.picture).square().mean()))


class Generator(nn.Module):
    """An hourglass's upper half: random input, convolutions with tanh, each but the first on twice the resolution.

    The last layer is fixed, as in the theory, and all layers are scaled so that the width plays no role.

    Args:
        factor: On each layer's output.
        seed: Draws input and weights.
    """

    u: Tensor
    v: Tensor

    def __init__(self, factor: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        small = SIZE >> (LAYERS - 1)
        self.factor = factor
        self.register_buffer("u", torch.randn(1, WIDTH, small, small, generator=generator))
        self.kernels = nn.ParameterList(torch.randn(WIDTH, WIDTH, 3, 3, generator=generator) for _ in range(LAYERS))
        self.register_buffer("v", torch.randn(3, WIDTH, 1, 1, generator=generator))

    def forward(self) -> Tensor:
        """Return a picture (3, SIZE, SIZE)."""
        x = self.u
        for i, kernel in enumerate(self.kernels):
            x = F.interpolate(x, scale_factor=2, mode="bilinear") if i else x
            x = torch.tanh(self.factor / math.sqrt(9 * WIDTH) * F.conv2d(x, kernel, padding=1))
        return 0.5 + 0.5 * F.conv2d(x, self.v / math.sqrt(WIDTH))[0]


def largest_eigenvalue(net: Generator, seen: Tensor, iterations: int = 12) -> float:
    """Return the largest eigenvalue of J Jᵀ, the Gram matrix of the Jacobian of what is seen by the weights.

    By power iteration: J Jᵀ v is the gradient of |Jᵀ v|² / 2 by v.
    """
    picture, weights = net() * seen, list(net.parameters())
    vector, value = torch.ones_like(picture).requires_grad_(), 0.0
    for _ in range(iterations):
        pulled = torch.autograd.grad((picture * vector).sum(), weights, create_graph=True)
        energy = torch.stack([part.square().sum() for part in pulled]).sum() / 2
        (product,) = torch.autograd.grad(energy, vector, retain_graph=True)
        value = float((vector.detach() * product).sum() / vector.detach().square().sum())
        vector = (product / product.norm()).requires_grad_()
    return value


@dataclass(frozen=True)
class Restoration:
    """What became of a picture.

    Attributes:
        residuals: Every EVERY steps.
        psnrs: At the same moments.
        picture: The last one.
    """

    residuals: list[float]
    psnrs: list[float]
    picture: Tensor

    def stop(self, level: float) -> int | None:
        """Return the first step at which the residual was at most `level`; None if it never was."""
        return next((EVERY * i for i, residual in enumerate(self.residuals) if residual <= level), None)


def restore(problem: Problem, density: float, factor: float, step: float, seed: int) -> Restoration:
    """Fit a generator to a damaged picture by gradient descent with momentum.

    Args:
        problem: Data and truth; the truth is only compared with.
        density: Share of the weights of each layer that are kept, at random.
        factor: On each layer's output.
        step: Of the descent on half the sum of squared differences.
        seed: Draws network and mask.
    """
    net = Generator(factor, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    masks = {n: torch.rand(p.shape, generator=generator) < density for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), step, MOMENTUM)
    Masks(net, masks).attach(optimizer)
    residuals, psnrs = [], []
    for done in range(STEPS + 1):
        output = net()
        if done % EVERY == 0:
            now = problem.restored(output.detach())
            residuals.append(problem.residual(output.detach()))
            psnrs.append(problem.psnr(now))
        optimizer.zero_grad()
        (((output - problem.data) * problem.seen).square().sum() / 2).backward()
        optimizer.step()
    return Restoration(residuals, psnrs, now)


# ------------------------------------------------------------------------------------------------------------ problems


def photograph(name: str) -> Tensor:
    """Return a square of a photograph as (3, SIZE, SIZE) in [0, 1].

    Raises:
        MissingDependency: scikit-image is not installed.
    """
    pixels = torch.from_numpy(getattr(optional_import("skimage.data", "studies"), name)())
    top, left, side = PHOTOGRAPHS[name]
    square = pixels[top : top + side, left : left + side].permute(2, 0, 1).float() / 255
    return F.interpolate(square[None], size=(SIZE, SIZE), mode="area")[0]


def damaged(picture: Tensor, seed: int) -> dict[str, Problem]:
    """Return the two problems of a picture: take the noise away, fill in the pixels that are missing."""
    generator = torch.Generator().manual_seed(seed)
    noisy = picture + NOISE * torch.randn(picture.shape, generator=generator)
    seen = (torch.rand(1, *picture.shape[1:], generator=generator) < SEEN).float()
    color = (picture * seen).sum((1, 2), keepdim=True) / seen.sum()
    return {
        "denoising": Problem(picture, noisy, torch.ones_like(seen)),
        "inpainting": Problem(picture, torch.where(seen > 0, picture, color), seen),
    }


def best_filter(problem: Problem) -> Tensor:
    """Return the best picture that a Gaussian filter makes of the data, of all widths: this knows the truth."""
    found = [problem.restored(_smoothed(problem, width)) for width in WIDTHS_OF_FILTER]
    return max(found, key=problem.psnr)


def _smoothed(problem: Problem, width: float) -> Tensor:
    reach = math.ceil(4 * width)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * width**2))

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x[:, None], kernel.view(1, 1, 1, -1), padding=(0, reach))
        return F.conv2d(x, kernel.view(1, 1, -1, 1), padding=(reach, 0))[:, 0]

    return blur(problem.data * problem.seen) / blur(problem.seen).clamp_min(1e-12)


# -------------------------------------------------------------------------------------------------------------- the run

Key = tuple[str, str]
"""A photograph and what is to be done with it."""


def arms() -> dict[str, tuple[float, float]]:
    """Return density and factor by name."""
    pruned = {f"{p:.0%}": (p, 1.0) for p in DENSITIES}
    rescaled = {f"{p:.0%}, rescaled": (p, p**-0.5) for p in DENSITIES}
    return {"dense": (1.0, 1.0), **pruned, **rescaled}


def run(seed: int, progress: OnProgress) -> Findings:
    """Restore all pictures with all networks and compare with the claims."""
    problems: dict[Key, Problem] = {}
    for i, name in enumerate(PHOTOGRAPHS):
        for task, problem in damaged(photograph(name), 100 * seed + i).items():
            problems[name, task] = problem
    dense = Generator(1.0, seed)
    steps = {key: SPEED / largest_eigenvalue(dense, problem.seen) for key, problem in problems.items()}
    found: dict[Key, dict[str, Restoration]] = {key: {} for key in problems}
    for done, (arm, (density, factor)) in enumerate(arms().items()):
        for part, (key, problem) in enumerate(problems.items()):
            progress(f"{arm}: {' '.join(key)}", done * len(problems) + part, len(arms()) * len(problems))
            found[key][arm] = restore(problem, density, factor, steps[key], seed)
    filtered = {key: best_filter(problem) for key, problem in problems.items()}
    data = {
        f"{task} {name}": {
            "step": steps[name, task],
            "given": problem.psnr(problem.data.clamp(0, 1)),
            "best_filter": problem.psnr(filtered[name, task]),
            "psnr": {arm: restoration.psnrs for arm, restoration in found[name, task].items()},
            "residual": {arm: restoration.residuals for arm, restoration in found[name, task].items()},
        }
        for (name, task), problem in problems.items()
    }
    return Findings(_claims(problems, found), _exhibits(problems, found, filtered), data)


def _claims(problems: Mapping[Key, Problem], found: Mapping[Key, Mapping[str, Restoration]]) -> tuple[Claim, ...]:
    bare, mended = f"{JUDGED:.0%}", f"{JUDGED:.0%}, rescaled"
    gains = [of["dense"].psnrs[-1] - problems[key].psnr(problems[key].data.clamp(0, 1)) for key, of in found.items()]
    noisy = [of for (_, task), of in found.items() if task == "denoising"]
    stops = {arm: [of[arm].stop(SAFETY * NOISE) for of in noisy] for arm in ("dense", bare, mended)}
    middle = JUDGED**-0.5
    slower, as_fast = (_ratio(stops[arm], stops["dense"]) for arm in (bare, mended))
    losses = [of["dense"].psnrs[-1] - of[mended].psnrs[-1] for of in found.values()]
    derived = "derived from the theory of two layers (Buskulic, Quéau, Fadili 2023); the use for pruning is ours"
    return (
        Claim(
            "A wide untrained network restores pictures: it takes them in before the noise.",
            "Ulyanov et al., CVPR 2018; Buskulic, Quéau, Fadili 2023",
            "at least 3 dB better than what is given (missing pixels: the mean color), on each picture",
            f"at least {min(gains):.1f} dB",
            min(gains) >= 3,
        ),
        Claim(
            f"A random mask of density {JUDGED:g} slows the descent down; the factor p^-1/2 makes up for it.",
            derived,
            f"steps until the residual is {SAFETY} times the noise, relative to the dense network: at least 1/p = "
            f"{1 / JUDGED:g} without and 1 with the factor; judged by the middle, {middle:.2f}, mean of the pictures",
            f"{_words(slower)} and {_words(as_fast)}",
            slower > middle > as_fast,
        ),
        Claim(
            f"With the factor, the network with {JUDGED:.0%} of its weights restores as well as the dense one.",
            derived,
            "at most 0.5 dB worse on each picture",
            f"at most {max(losses):.2f} dB worse",
            max(losses) <= 0.5,
        ),
    )


def _ratio(steps: Sequence[int | None], dense: Sequence[int | None]) -> float:
    """Return the mean ratio of numbers of steps; one that was never reached counts as more than all steps."""
    if any(d is None for d in dense):
        return math.nan
    pairs = zip(steps, dense, strict=True)
    return mean(math.inf if own is None else own / d for own, d in pairs if d is not None)


def _words(ratio: float) -> str:
    return f"not within {STEPS} steps" if math.isinf(ratio) else f"{ratio:.2f}"


def _exhibits(
    problems: Mapping[Key, Problem], found: Mapping[Key, Mapping[str, Restoration]], filtered: Mapping[Key, Tensor]
) -> tuple[Exhibit, ...]:
    about = (
        f"Pictures: {' and '.join(PHOTOGRAPHS)} (scikit-image), {SIZE} x {SIZE}. Denoising: noise of standard "
        f"deviation {NOISE}; inpainting: {SEEN:.0%} of the pixels are given. Convolutions of width {WIDTH}, {STEPS} "
        f"steps of gradient descent with momentum {MOMENTUM}, the same step for all networks. Percentages: densities "
        "of random masks; rescaled: with the factor p^-1/2 on each layer."
    )

    def average(task: str, arm: str, at: int = -1) -> float:
        return mean(of[arm].psnrs[at] for (_, own), of in found.items() if own == task)

    tasks = dict.fromkeys(task for _, task in problems)
    moments = range(STEPS // EVERY + 1)
    shown = ("dense", *(name for p in DENSITIES[:2] for name in (f"{p:.0%}", f"{p:.0%}, rescaled")))
    curves = {
        task: lines_figure(
            {arm: [(EVERY * i, average(task, arm, i)) for i in moments] for arm in shown}, "steps", "PSNR (dB)"
        )
        for task in tasks
    }
    by_density = {
        f"{task}{how}": [
            (100.0, average(task, "dense")),
            *((100 * p, average(task, f"{p:.0%}{how}")) for p in DENSITIES),
        ]
        for task in tasks
        for how in ("", ", rescaled")
    }
    head = ("PSNR (dB)", *(f"{task}: {name}" for name, task in problems))
    rows = [
        ("given", *(f"{p.psnr(p.data.clamp(0, 1)):.1f}" for p in problems.values())),
        ("best Gaussian filter", *(f"{p.psnr(filtered[key]):.1f}" for key, p in problems.items())),
        *((arm, *(f"{of[arm].psnrs[-1]:.1f}" for of in found.values())) for arm in arms()),
    ]
    return (
        *(
            Exhibit(
                f"{task.capitalize()}, step by step",
                "Means over the pictures. " + about,
                curves[task],
                claims=(0, 1) if task == "denoising" else (0,),
            )
            for task in tasks
        ),
        Exhibit(
            "PSNR by density",
            f"After {STEPS} steps, means over the pictures. " + about,
            lines_figure(by_density, "kept weights (%, log scale)", "PSNR (dB)", log_x=True, falling_x=True),
            claims=(2,),
        ),
        Exhibit("The pictures", about, _pictures(problems, found, filtered), claims=(0, 2)),
        Exhibit("All figures", about, table=Table(head, rows)),
    )


def _pictures(
    problems: Mapping[Key, Problem], found: Mapping[Key, Mapping[str, Restoration]], filtered: Mapping[Key, Tensor]
) -> str:
    rows: dict[str, dict[str, Tensor]] = {}
    for (name, task), problem in problems.items():
        pictures = {"true": problem.picture, "given": problem.data, "best Gaussian filter": filtered[name, task]}
        pictures |= {arm: of.picture for arm, of in found[name, task].items() if "1%" not in arm}
        rows[f"{task.capitalize()}: {name}"] = {
            what if what == "true" else f"{what}, {problem.psnr(picture.clamp(0, 1)):.1f} dB": picture
            for what, picture in pictures.items()
        }
    return pictures_figure(rows)


STUDY = Study(
    name="image-restoration",
    title="Photographs restored by untrained networks, dense and pruned",
    question="Does a wide untrained network restore pictures, and what do a random mask and its factor change?",
    source="Ulyanov, Vedaldi, Lempitsky: Deep Image Prior, CVPR 2018; Buskulic, Quéau, Fadili: Convergence Guarantees "
    "of Overparametrized Wide Deep Inverse Prior, SSVM 2023",
    run=run,
)
