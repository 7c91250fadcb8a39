"""How much may be pruned at random before a network no longer generalizes.

Yang, Liang, Guo, Wu, Wang: Theoretical Characterization of How Neural Network Pruning Affects its Generalization, 2023
(arXiv 2301.00335). Inputs are a class's signal on one coordinate and noise on all others; a network of two layers with
activation max(0, z)^q, whose second layer is fixed, is pruned at random before training. We could read the paper's
abstract only; the setting below is reconstructed, and the predictions are derived from it.

A signal survives if one of the m neurons of its class keeps its coordinate: 1 - (1 - p)^m at density p, while the noise
that a neuron sees falls with p. So the test loss falls with p at first, and the network knows nothing beyond
p = log(K) / m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.measure.figures import lines_figure
from secateur.measure.report import Table
from secateur.studies.study import Claim, Exhibit, Findings, OnProgress, Study

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003)
DRAWS = 5


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


@dataclass(frozen=True)
class Outcome:
    """What became of one network."""

    train_loss: float
    test_loss: float
    test_accuracy: float
    survivors: float
    """Share of the classes whose signal a neuron of that class still sees."""


def train(setting: Setting, density: float, seed: int) -> Outcome:
    """Prune a network at random, train it by gradient descent, and test it."""
    generator = torch.Generator().manual_seed(seed)
    x, labels = setting.draw(setting.samples, generator)
    test_x, test_labels = setting.draw(setting.test_samples, generator)
    shape = (setting.classes * setting.neurons, setting.inputs)
    mask = (torch.rand(shape, generator=generator) < density).float()
    weight = (setting.scale * torch.randn(shape, generator=generator) * mask).requires_grad_()
    for _ in range(setting.steps):
        loss = F.cross_entropy(setting.logits(weight, x), labels)
        (slope,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= setting.lr * slope * mask
    with torch.no_grad():
        test_logits = setting.logits(weight, test_x)
        own = mask.view(setting.classes, setting.neurons, -1)
        return Outcome(
            float(F.cross_entropy(setting.logits(weight, x), labels)),
            float(F.cross_entropy(test_logits, test_labels)),
            float((test_logits.argmax(1) == test_labels).float().mean()),
            sum(float(own[k, :, k].any()) for k in range(setting.classes)) / setting.classes,
        )


def run(seed: int, progress: OnProgress) -> Findings:
    """Train networks of all densities and compare with the claims."""
    setting = Setting()
    outcomes: dict[float, list[Outcome]] = {}
    for done, density in enumerate(DENSITIES):
        progress(f"density {density:g}", done, len(DENSITIES))
        outcomes[density] = [train(setting, density, 1000 * seed + draw) for draw in range(DRAWS)]
    data = {f"{density:g}": [vars(o) for o in found] for density, found in outcomes.items()}
    mean = {key: {p: _mean(o, key) for p, o in outcomes.items()} for key in vars(outcomes[1.0][0])}
    return Findings(_claims(setting, mean), _exhibits(setting, mean), data)


def _mean(outcomes: list[Outcome], key: str) -> float:
    return float(sum(vars(outcome)[key] for outcome in outcomes)) / len(outcomes)


def _claims(setting: Setting, mean: dict[str, dict[float, float]]) -> tuple[Claim, ...]:
    paper = "Yang et al. 2023, abstract"
    mild = [p for p in DENSITIES if p >= 0.05]
    falling = [mean["test_loss"][p] for p in mild]
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
            "the test loss falls from each density to the next smaller one",
            " > ".join(f"{value:.3f}" for value in falling),
            all(a > b for a, b in pairwise(falling)),
        ),
        Claim(
            "Beyond a large pruned fraction the network is no better than guessing.",
            paper,
            f"test loss at density {few:g} at least 0.9 log K = {0.9 * chance:.2f}",
            f"{mean['test_loss'][few]:.2f}, accuracy {mean['test_accuracy'][few]:.0%}",
            mean["test_loss"][few] > 0.9 * chance and mean["test_accuracy"][few] < 0.4,
        ),
        Claim(
            "A signal survives with probability 1 - (1 - p)^m, which is where the threshold comes from.",
            "derived",
            f"all densities within 3 standard errors (of at least 0.05: one class of one of {DRAWS} networks)",
            f"largest deviation {deviation:.1f}",
            deviation < 3,
        ),
    )


def _exhibits(setting: Setting, mean: dict[str, dict[float, float]]) -> tuple[Exhibit, ...]:
    words = {"train_loss": "training loss", "test_loss": "test loss"}
    lines = {words[key]: [(100 * p, mean[key][p]) for p in DENSITIES] for key in words}
    lines["guessing (log K)"] = [(100 * p, math.log(setting.classes)) for p in (1.0, DENSITIES[-1])]
    shares = {
        "test accuracy": [(100 * p, 100 * mean["test_accuracy"][p]) for p in DENSITIES],
        "classes whose signal survives": [(100 * p, 100 * mean["survivors"][p]) for p in DENSITIES],
    }
    rows = [
        (
            f"{p:g}",
            f"{mean['train_loss'][p]:.3f}",
            f"{mean['test_loss'][p]:.3f}",
            f"{100 * mean['test_accuracy'][p]:.1f}",
            f"{100 * mean['survivors'][p]:.0f}",
        )
        for p in DENSITIES
    ]
    about = (
        f"{setting.classes} classes, {setting.inputs} inputs, {setting.neurons} neurons a class, {setting.samples} "
        f"training samples, {setting.steps} steps of gradient descent, means over {DRAWS} networks."
    )
    head = ("density", "training loss", "test loss", "test accuracy (%)", "signals that survive (%)")
    x_title, scale = "kept weights (%, log scale, fewer to the right)", {"log_x": True, "falling_x": True}
    return (
        Exhibit("Loss", about, figure=lines_figure(lines, x_title, "cross-entropy (nats)", **scale)),
        Exhibit("Accuracy and coverage", about, figure=lines_figure(shares, x_title, "share (%)", **scale)),
        Exhibit("All figures", about, table=Table(head, rows, text_columns=())),
    )


STUDY = Study(
    name="pruned-fraction",
    title="How the pruned fraction affects generalization",
    question="Random pruning before training helps up to a threshold, and then the network knows nothing. Does it?",
    source="Yang, Liang, Guo, Wu, Wang: Theoretical Characterization of How Neural Network Pruning Affects its "
    "Generalization, 2023",
    run=run,
)
