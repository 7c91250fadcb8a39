"""How much may be pruned at random before a network no longer generalizes.

Yang, Liang, Guo, Wu, Wang: Theoretical Characterization of How Neural Network Pruning Affects its Generalization, 2023
(arXiv 2301.00335). Inputs are a class's signal on one coordinate and noise on all others; a network of two layers with
activation max(0, z)^q, whose second layer is fixed, is pruned at random before training. We could read the paper's
abstract only; the setting below is reconstructed, and the predictions are derived from it.

A signal survives if one of the m neurons of its class keeps its coordinate: 1 - (1 - p)^m at density p, while the noise
that a neuron sees falls with p. So the test loss falls with p at first, and the network knows nothing beyond
p = log(K) / m.

For a trained network this becomes a bound on its test error. The third root of a class's output (for q = 3) is a 3-norm
of its rectified neurons, and moves by at most L = sigma ||W||, in the spectral norm over the coordinates of noise, per
unit of standard noise. Hence, by the concentration of Gaussian measure, a sample of class k goes to j with probability
at most exp(-margin² / (2 (L_k + L_j)²)), where the margin is the mean of root k minus root j. Over all j this adds up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.measure.figures import lines_figure
from secateur.measure.report import Table
from secateur.studies.study import Claim, Exhibit, Findings, OnProgress, Study

DENSITIES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.0003)
DRAWS = 5
FEW_SAMPLES, LONG, WIDE, MEMORIZED = 4, 5000, 40000, 6e-5
"""Samples, steps, inputs and density at which samples are learned by heart.

No signal may survive, although every neuron sees noise: K m p must be far below 1 and p d above it, so d far above K m.
"""


@dataclass(frozen=True)
class Setting:
    """Signal-and-noise data and a network, reconstructed after the paper at a size that runs in a minute.

    Attributes:
        classes: K.
        inputs: d; the first K coordinates carry the signals.
        neurons: m, for each class.
        samples: n, of training.
        signal: Size of a signal.
        noise: Standard deviation of every other coordinate.
        scale: Standard deviation of the initial weights.
        power: q of the activation max(0, z)^q.
        lr: Step of full-batch gradient descent.
        steps: Of it.
        test_samples: To estimate the test loss with.
    """

    classes: int = 4
    inputs: int = 800
    neurons: int = 40
    samples: int = 40
    signal: float = 1.0
    noise: float = 0.12
    scale: float = 0.05
    power: int = 3
    lr: float = 1.0
    steps: int = 1500
    test_samples: int = 1000

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs (n, d) and labels (n,), the classes equally often."""
        labels = torch.arange(n) % self.classes
        x = self.noise * torch.randn(n, self.inputs, generator=generator)
        x[:, : self.classes] = 0
        x[torch.arange(n), labels] = self.signal
        return x, labels

    def logits(self, weight: Tensor, x: Tensor) -> Tensor:
        """(K m, d), (n, d) -> (n, K): the sum of each class's neurons."""
        return F.relu(x @ weight.T).pow(self.power).view(len(x), self.classes, self.neurons).sum(2)

    def error_bound(self, weight: Tensor, x: Tensor, labels: Tensor) -> float:
        """Return the bound on the test error, which is a probability; `x` and `labels` give the mean margins."""
        roots = self.logits(weight, x).pow(1 / self.power)
        by_class = torch.stack([roots[labels == k].mean(0) for k in range(self.classes)])
        margins = (by_class.diagonal()[:, None] - by_class).clamp_min(0)
        noise = weight.view(self.classes, self.neurons, -1)[:, :, self.classes :]
        reach = self.noise * torch.linalg.matrix_norm(noise, 2)
        wrong = (-(margins**2) / (2 * (reach[:, None] + reach) ** 2).clamp_min(1e-30)).exp().fill_diagonal_(0)
        return float(wrong.sum(1).clamp_max(1).mean())


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        train_loss: Cross-entropy.
        test_loss: Cross-entropy.
        test_accuracy: In [0, 1].
        error_bound: On 1 - test accuracy, for new samples.
        survivors: Share of the classes whose signal a neuron of that class still sees.
    """

    train_loss: float
    test_loss: float
    test_accuracy: float
    error_bound: float
    survivors: float


def train(setting: Setting, density: float, seed: int) -> Outcome:
    """Prune a network at random, train it by gradient descent, and test it."""
    generator = torch.Generator().manual_seed(seed)
    x, labels = setting.draw(setting.samples, generator)
    test_x, test_labels = setting.draw(setting.test_samples, generator)
    shape = (setting.classes * setting.neurons, setting.inputs)
    mask = (torch.rand(shape, generator=generator) < density).float()
    weight = setting.scale * torch.randn(shape, generator=generator) * mask
    seen = mask.any(0)  # by a neuron; the other inputs would only take time
    part, part_x, part_mask = weight[:, seen].requires_grad_(), x[:, seen], mask[:, seen]
    for _ in range(setting.steps):
        loss = F.cross_entropy(setting.logits(part, part_x), labels)
        (slope,) = torch.autograd.grad(loss, part)
        with torch.no_grad():
            part -= setting.lr * slope * part_mask
    with torch.no_grad():
        weight[:, seen] = part
        test_logits = setting.logits(weight, test_x)
        own = mask.view(setting.classes, setting.neurons, -1)
        return Outcome(
            float(F.cross_entropy(setting.logits(weight, x), labels)),
            float(F.cross_entropy(test_logits, test_labels)),
            float((test_logits.argmax(1) == test_labels).float().mean()),
            setting.error_bound(weight, test_x, test_labels),
            sum(float(own[k, :, k].any()) for k in range(setting.classes)) / setting.classes,
        )


def run(seed: int, progress: OnProgress) -> Findings:
    """Train networks of all densities and compare with the claims."""
    setting = Setting()
    outcomes: dict[float, list[Outcome]] = {}
    for done, density in enumerate(DENSITIES):
        progress(f"density {density:g}", done, len(DENSITIES) + 1)
        outcomes[density] = [train(setting, density, 1000 * seed + draw) for draw in range(DRAWS)]
    progress(f"density {MEMORIZED:g}, {FEW_SAMPLES} samples", len(DENSITIES), len(DENSITIES) + 1)
    few = replace(setting, samples=FEW_SAMPLES, steps=LONG, inputs=WIDE)
    by_heart = [train(few, MEMORIZED, 1000 * seed + draw) for draw in range(DRAWS)]
    data = {f"{density:g}": [vars(o) for o in found] for density, found in outcomes.items()}
    data["by_heart"] = [vars(o) for o in by_heart]
    mean = {key: {p: _mean(o, key) for p, o in outcomes.items()} for key in vars(outcomes[1.0][0])}
    learned = {key: _mean(by_heart, key) for key in mean}
    return Findings(_claims(setting, mean, learned), _exhibits(setting, mean, learned), data)


def _mean(outcomes: list[Outcome], key: str) -> float:
    return float(sum(vars(outcome)[key] for outcome in outcomes)) / len(outcomes)


Means = dict[str, dict[float, float]]
"""Of each entry of an outcome, by density."""


def _claims(setting: Setting, mean: Means, by_heart: dict[str, float]) -> tuple[Claim, ...]:
    paper = "Yang et al. 2023, abstract"
    mild, safe = [p for p in DENSITIES if p >= 0.05], _below_the_threshold(setting)
    falling = [mean["test_loss"][p] for p in safe]
    chance, few = math.log(setting.classes), DENSITIES[-1]
    expected = {p: 1 - (1 - p) ** setting.neurons for p in DENSITIES}
    deviation = max(
        abs(mean["survivors"][p] - e) / max(math.sqrt(e * (1 - e) / (DRAWS * setting.classes)), 0.05)
        for p, e in expected.items()
    )
    return (
        Claim(
            "Below a threshold of the pruned fraction, gradient descent drives the training loss to zero.",
            paper,
            f"training loss under 0.01 at densities {mild[-1]:g} and above",
            f"at most {max(mean['train_loss'][p] for p in mild):.2g}",
            max(mean["train_loss"][p] for p in mild) < 0.01,
        ),
        Claim(
            "Below it, the generalization improves as the pruned fraction grows.",
            paper,
            f"the test loss falls from each density to the next smaller one, down to {safe[-1]:g}: the last at which, "
            "with probability 95 %, no network misses a signal",
            " > ".join(f"{value:.3f}" for value in falling),
            all(a > b for a, b in pairwise(falling)),
        ),
        _claim_of_the_bound(mean, safe),
        Claim(
            "Beyond a large pruned fraction the network is no better than guessing.",
            paper,
            f"test loss at density {few:g} at least 0.9 log K = {0.9 * chance:.2f}",
            f"{mean['test_loss'][few]:.2f}, accuracy {mean['test_accuracy'][few]:.0%}",
            mean["test_loss"][few] > 0.9 * chance and mean["test_accuracy"][few] < 0.4,
        ),
        _claim_by_heart(setting, by_heart),
        Claim(
            "A signal survives with probability 1 - (1 - p)^m, which is where the threshold comes from.",
            "derived",
            f"all densities within 3 standard errors (of at least 0.05: one class of one of {DRAWS} networks)",
            f"largest deviation {deviation:.1f}",
            deviation < 3,
        ),
    )


def _below_the_threshold(setting: Setting) -> list[float]:
    """Return the densities at which, with probability 95 %, all signals of all networks are learned.

    Of the weights that are kept, half are positive at first; a neuron whose weight is negative is silent at its signal.
    """
    signals = setting.classes * DRAWS
    return [p for p in DENSITIES if (1 - (1 - p / 2) ** setting.neurons) ** signals >= 0.95]


def _claim_of_the_bound(mean: Means, safe: list[float]) -> Claim:
    bound = mean["error_bound"]
    kept = all(bound[p] >= 1 - mean["test_accuracy"][p] for p in DENSITIES)
    return Claim(
        "Below it, the bound on the test error improves as the pruned fraction grows; beyond it, it says nothing.",
        "Yang et al. 2023, abstract, for their bound; this one is derived",
        f"falls from each density to the next smaller one down to {safe[-1]:g}, is at least 0.9 at "
        f"{DENSITIES[-1]:g}, and is never below the test error; means over networks",
        " > ".join(f"{bound[p]:.1g}" for p in safe) + f"; {bound[DENSITIES[-1]]:.2g} at {DENSITIES[-1]:g}",
        all(bound[a] > bound[b] for a, b in pairwise(safe)) and bound[DENSITIES[-1]] >= 0.9 and kept,
    )


def _claim_by_heart(setting: Setting, by_heart: dict[str, float]) -> Claim:
    guessing, found = 1 / setting.classes, by_heart["test_accuracy"]
    spread = 3 * math.sqrt(guessing * (1 - guessing) / (DRAWS * setting.test_samples))
    return Claim(
        "There is a large pruned fraction at which descent still drives the training loss to zero, by memorizing "
        "noise, while the network is no better than guessing.",
        "Yang et al. 2023, abstract",
        f"at density {MEMORIZED:g} with {FEW_SAMPLES} samples of {WIDE:,} inputs: training loss under 0.01, test loss "
        f"at least log K = {-math.log(guessing):.2f}, accuracy within 3 standard errors of guessing: {guessing:.0%} "
        f"± {spread:.1%}",
        f"{by_heart['train_loss']:.2g}, {by_heart['test_loss']:.2f}, {found:.1%}",
        by_heart["train_loss"] < 0.01
        and by_heart["test_loss"] >= -math.log(guessing)
        and abs(found - guessing) <= spread,
    )


def _exhibits(setting: Setting, mean: Means, by_heart: dict[str, float]) -> tuple[Exhibit, ...]:
    words = {"train_loss": "training loss", "test_loss": "test loss"}
    lines = {words[key]: [(100 * p, mean[key][p]) for p in DENSITIES] for key in words}
    lines["guessing (log K)"] = [(100 * p, math.log(setting.classes)) for p in (1.0, DENSITIES[-1])]
    lines |= {f"{words[key]}, learned by heart": [(100 * MEMORIZED, by_heart[key])] for key in words}
    shares = {
        "test error": [(100 * p, 100 * (1 - mean["test_accuracy"][p])) for p in DENSITIES],
        "bound on the test error": [(100 * p, 100 * mean["error_bound"][p]) for p in DENSITIES],
        "classes whose signal survives": [(100 * p, 100 * mean["survivors"][p]) for p in DENSITIES],
    }
    columns = {f"{p:g}": {key: mean[key][p] for key in mean} for p in DENSITIES}
    columns[f"{MEMORIZED:g}, by heart"] = by_heart
    rows = [
        (
            name,
            f"{of['train_loss']:.3f}",
            f"{of['test_loss']:.3f}",
            f"{100 * of['test_accuracy']:.1f}",
            f"{100 * of['error_bound']:.3g}",
            f"{100 * of['survivors']:.0f}",
        )
        for name, of in columns.items()
    ]
    about = (
        f"{setting.classes} classes, {setting.inputs} inputs, {setting.neurons} neurons a class, {setting.samples} "
        f"training samples, {setting.steps} steps of gradient descent, means over {DRAWS} networks. Learned by heart: "
        f"{FEW_SAMPLES} samples, {LONG} steps, {WIDE:,} inputs."
    )
    head = ("density", "training loss", "test loss", "test accuracy (%)", "bound on the error (%)", "signals left (%)")
    x_title, scale = "kept weights (%, log scale, fewer to the right)", {"log_x": True, "falling_x": True}
    return (
        Exhibit("Loss", about, lines_figure(lines, x_title, "cross-entropy (nats)", **scale), claims=(0, 1, 3, 4)),
        Exhibit(
            "Error, its bound, and coverage", about, lines_figure(shares, x_title, "share (%)", **scale), claims=(2, 5)
        ),
        Exhibit("All figures", about, table=Table(head, rows)),
    )


STUDY = Study(
    name="pruned-fraction",
    title="How the pruned fraction affects generalization",
    question="Random pruning before training helps up to a threshold, and then the network knows nothing. Does it?",
    source="Yang, Liang, Guo, Wu, Wang: Theoretical Characterization of How Neural Network Pruning Affects its "
    "Generalization, 2023",
    run=run,
)
