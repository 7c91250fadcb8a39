"""The edge of chaos: how signals travel through dense, pruned and rescaled networks of random weights.

Hayou, Ton, Doucet, Teh: Robust Pruning at Initialization, ICLR 2021; the mean-field theory is Poole et al. 2016 and
Schoenholz et al. 2017. With weights of variance sigma_w² / width and biases of variance sigma_b², in the limit of
infinite width, the variance q and the correlation c of two inputs map from layer to layer as

    q' = sigma_b² + sigma_w² E[phi(sqrt(q) Z)²],   c' = (sigma_b² + sigma_w² E[phi(U) phi(V)]) / q'

and chi = sigma_w² E[phi'(sqrt(q) Z)²] is the slope of the correlation map at 1: chi = 1 is the edge
(`secateur.parts.mean_field`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from secateur.measure.figures import lines_figure
from secateur.measure.report import Table
from secateur.parts.mean_field import edge_of_chaos, edge_with_variance, variance_at_edge
from secateur.studies.study import Claim, Exhibit, Findings, OnProgress, Study

WIDTH, DEPTH, DRAWS, SPARSITY = 500, 50, 10, 0.9


def relu_correlation(c: float) -> float:
    """Return the correlation one layer on, for ReLU on the edge (sigma_b = 0, sigma_w² = 2)."""
    return (c * math.asin(c) + math.sqrt(max(1 - c * c, 0.0))) / math.pi + c / 2


@dataclass(frozen=True)
class Travel:
    """Statistics of two inputs at each layer of random ReLU networks, means over draws: lists over the layers."""

    variance: list[float]
    correlation: list[float]
    kept_variance: list[float]
    """The share of the weights' variance that each mask keeps, multiplied up to this layer."""


def travel(sparsity: float, rescaled: bool, generator: torch.Generator) -> Travel:
    """Send two inputs of correlation about 0 through ReLU networks at the edge whose smallest weights are pruned.

    Args:
        sparsity: Share of each layer's weights that is zero, the smallest in size.
        rescaled: Multiply each layer so that its weights have the second moment of the dense ones (the rescaling
            trick).
        generator: Draws inputs and weights.
    """
    y = torch.randn(DRAWS, WIDTH, 2, generator=generator, dtype=torch.float64)
    variance, correlation, kept, share = [], [], [], torch.ones(DRAWS, dtype=torch.float64)
    for layer in range(DEPTH):
        weight = torch.randn(DRAWS, WIDTH, WIDTH, generator=generator, dtype=torch.float64) * math.sqrt(2 / WIDTH)
        limit = weight.abs().flatten(1).kthvalue(max(1, round(sparsity * WIDTH**2)), dim=1).values
        pruned = weight * (weight.abs() > limit[:, None, None]) if sparsity else weight
        alpha = pruned.square().mean((1, 2)) * WIDTH / 2
        pruned = pruned / alpha.sqrt()[:, None, None] if rescaled else pruned
        share = share if rescaled else share * alpha
        y = torch.bmm(pruned, y if layer == 0 else y.relu())
        second = torch.einsum("dna,dnb->dab", y, y) / WIDTH
        variance.append(float(second.diagonal(dim1=1, dim2=2).mean()))
        norm = (second[:, 0, 0] * second[:, 1, 1]).sqrt()
        correlation.append(float((second[:, 0, 1] / norm).mean()))
        kept.append(float(share.mean()))
    return Travel(variance, correlation, kept)


def run(seed: int, progress: OnProgress) -> Findings:
    """Draw the edge, send signals through random networks, and compare with the theory."""
    generator = torch.Generator().manual_seed(seed)
    arms = {"dense": (0.0, False), "pruned": (SPARSITY, False), "pruned, rescaled": (SPARSITY, True)}
    found = {}
    for done, (name, (sparsity, rescaled)) in enumerate(arms.items()):
        progress(name, done, len(arms))
        found[name] = travel(sparsity, rescaled, generator)
    curve = [edge_with_variance("tanh", q) for q in np.geomspace(1e-4, 3.0, 60).tolist()]
    theory = [found["dense"].correlation[0]]
    while len(theory) < DEPTH:
        theory.append(relu_correlation(theory[-1]))
    data = {"arms": {name: vars(arm) for name, arm in found.items()}, "edge_of_tanh": curve}
    return Findings(_claims(found, theory), _exhibits(found, theory, curve), data)


def _claims(found: dict[str, Travel], theory: list[float]) -> tuple[Claim, ...]:
    dense, pruned = found["dense"], found["pruned"]
    predicted = pruned.variance[0] / pruned.kept_variance[0]
    ratio = [v / (predicted * k) for v, k in zip(pruned.variance, pruned.kept_variance, strict=True)]
    drift = {name: t.variance[-1] / t.variance[0] for name, t in found.items()}
    far, c = 10_000, 0.0
    for _ in range(far):
        c = relu_correlation(c)
    limit = far**2 * (1 - c)
    apart = max(abs(a - b) for a, b in zip(dense.correlation, theory, strict=True))
    derived = "derived from the mean-field maps"
    return (
        Claim(
            "For ReLU on the edge, 1 - c falls as 9 pi² / (2 l²) with the layer l.",
            "Hayou et al. 2019; " + derived,
            f"l² (1 - c) -> {9 * math.pi**2 / 2:.2f}",
            f"{limit:.2f} at l = 10,000",
            abs(limit / (9 * math.pi**2 / 2) - 1) < 0.02,
        ),
        Claim(
            f"Networks of width {WIDTH} follow the correlation map.",
            derived,
            "largest difference under 0.05 over all layers",
            f"{apart:.3f}",
            apart < 0.05,
        ),
        Claim(
            "Pruned networks lose the share of the variance that each mask removes, layer by layer.",
            "Hayou et al., ICLR 2021; " + derived,
            f"variance / product of kept shares within 0.5 to 2 over {DEPTH} layers",
            f"{min(ratio):.2f} to {max(ratio):.2f}",
            min(ratio) > 0.5 and max(ratio) < 2,
        ),
        Claim(
            "The rescaling trick brings a pruned network back to the edge.",
            "Hayou et al., ICLR 2021",
            "the variance drifts no more than threefold that of the dense network; without it, it vanishes",
            ", ".join(f"{name}: {value:.2g}" for name, value in drift.items()),
            1 / 3 < drift["pruned, rescaled"] / drift["dense"] < 3 and drift["pruned"] < 1e-3,
        ),
    )


def _exhibits(found: dict[str, Travel], theory: list[float], curve: list[tuple[float, float]]) -> tuple[Exhibit, ...]:
    layers = list(range(1, DEPTH + 1))
    setting = f"ReLU, width {WIDTH}, magnitude pruning of {SPARSITY:.0%} of each layer, means over {DRAWS} networks."
    correlations = {name: list(zip(layers, t.correlation, strict=True)) for name, t in found.items()}
    correlations["theory (infinite width)"] = list(zip(layers, theory, strict=True))
    variances = {name: list(zip(layers, t.variance, strict=True)) for name, t in found.items()}
    rows = [
        (f"{b:.2f}", f"{edge_of_chaos('tanh', b):.4f}", f"{variance_at_edge('tanh', b):.4f}")
        for b in (0.05, 0.1, 0.2, 0.3, 0.5)
    ]
    return (
        Exhibit(
            "The edge of chaos",
            "Below the line signals of different inputs become equal (ordered), above it they become independent of "
            "each other (chaotic). For ReLU the edge is the single point (0, 1.414).",
            figure=lines_figure(
                {"tanh": curve, "ReLU": [(0.0, math.sqrt(2))]},
                "sigma_b: standard deviation of biases",
                "sigma_w: of weights, times √width",
            ),
        ),
        Exhibit(
            "The edge for tanh",
            "The variance q is the fixed point there.",
            table=Table(("sigma_b", "sigma_w", "q"), rows, text_columns=()),
        ),
        Exhibit(
            "Correlation of two inputs",
            "Masks do not change how correlations travel as long as the biases are zero. " + setting,
            figure=lines_figure(correlations, "layer", "correlation"),
            claims=(0, 1),
        ),
        Exhibit(
            "Variance of the signal",
            "Each pruned layer passes on a part of the variance, until nothing is left. " + setting,
            figure=lines_figure(variances, "layer", "variance (log scale)", log_y=True),
            claims=(2, 3),
        ),
    )


STUDY = Study(
    name="edge-of-chaos",
    title="The edge of chaos, before and after pruning",
    question="Why do deep networks that are pruned at initialization not train, and what does rescaling mend?",
    source="Hayou, Ton, Doucet, Teh: Robust Pruning at Initialization, ICLR 2021",
    run=run,
)
