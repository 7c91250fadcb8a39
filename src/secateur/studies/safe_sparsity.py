"""Whether the safe sparsity, which is estimated before any training, is where training begins to fail.

`secateur.measure.safe_sparsity` asks at which density random masks begin to cut signals of the data off, after Yang,
Liang, Guo, Wu, Wang (arXiv 2301.00335). Here networks are pruned at random to that density and to multiples of it, and
trained: the network of that theory (`secateur.studies.pruned_fraction`), and an ordinary one on images of digits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.core.masks import Masks
from secateur.core.randomness import generator_for
from secateur.measure.figures import lines_figure
from secateur.measure.report import Table
from secateur.measure.safe_sparsity import SafeSparsity, safe_sparsity
from secateur.studies.pruned_fraction import Setting, train
from secateur.studies.study import Claim, Exhibit, Findings, OnProgress, Study
from secateur.tasks import find_task

MULTIPLES = (4.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
DRAWS, STEPS, BATCH, LR = 3, 600, 128, 3e-3
LEARNED, LOST = 0.01, 0.1
"""A training loss below counts as zero (as in the study of the pruned fraction); so much accuracy is a loss."""


class ClassNeurons(nn.Module):
    """The theory's network as a module: a layer of neurons for each class, which are summed up."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.power = setting.power
        self.classes = nn.ModuleList(
            nn.Linear(setting.inputs, setting.neurons, bias=False) for _ in range(setting.classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, d) -> (n, K)."""
        return torch.stack([F.relu(neurons(x)).pow(self.power).sum(1) for neurons in self.classes], 1)


def multilayer() -> nn.Sequential:
    """Return a network for images of 24 x 24 digits."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(576, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def train_multilayer(density: Mapping[str, float], seed: int) -> tuple[float, float]:
    """Prune the network for digits at random, train it, and return its training loss and its test accuracy.

    Args:
        density: Of each pruned tensor; above 1 means 1.
        seed: Draws weights, masks and batches.
    """
    splits = find_task("digits").splits
    x, labels = splits.train.inputs, splits.train.targets
    torch.manual_seed(seed)
    model = multilayer()
    masks = {name: torch.rand_like(p) < density[name] for name, p in model.named_parameters() if name in density}
    optimizer = torch.optim.Adam(model.parameters(), LR)
    Masks(model, masks).attach(optimizer)
    for _ in range(STEPS):
        some = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), labels[some]).backward()
        optimizer.step()
    with torch.no_grad():
        hits = model(splits.test.inputs).argmax(1) == splits.test.targets
        return float(F.cross_entropy(model(x), labels)), float(hits.float().mean())


def run(seed: int, progress: OnProgress) -> Findings:
    """Estimate, then train at multiples of the estimated densities."""
    setting, train_split = Setting(), find_task("digits").splits.train
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = setting.draw(setting.samples, generator_for("data", seed))
        ours = safe_sparsity(multilayer(), [(train_split.inputs, train_split.targets)], seed=seed)
        theirs = safe_sparsity(ClassNeurons(setting), [batch], seed=seed)
        found: dict[str, dict[float, list[tuple[float, float]]]] = {"the theory's network": {}, "digits": {}}
        for done, multiple in enumerate(MULTIPLES):
            progress(f"{multiple:g} times the safe density", done, len(MULTIPLES))
            seeds = range(1000 * seed, 1000 * seed + DRAWS)
            density = min(1.0, multiple * (1 - theirs.by_layer.safe))
            outcomes = [train(setting, density, s) for s in seeds]
            found["the theory's network"][multiple] = [(o.train_loss, o.test_accuracy) for o in outcomes]
            densities = {layer.name: multiple * layer.density for layer in ours.layers}
            found["digits"][multiple] = [train_multilayer(densities, s) for s in seeds]
    estimates = {"the theory's network": theirs, "digits": ours}
    data = {
        name: {
            "safe_sparsity": estimates[name].by_layer.safe,
            "first_loss": list(estimates[name].by_layer.draws),
            "by_multiple": {f"{multiple:g}": pairs for multiple, pairs in outcomes.items()},
        }
        for name, outcomes in found.items()
    }
    return Findings(_claims(found, estimates), _exhibits(found, estimates), data)


Found = Mapping[str, Mapping[float, list[tuple[float, float]]]]
"""For each network and multiple of the safe density: training loss and test accuracy of each draw."""


def _claims(found: Found, estimates: Mapping[str, SafeSparsity]) -> tuple[Claim, ...]:
    claims = []
    for name, estimate in estimates.items():
        who, safe = name[0].upper() + name[1:], found[name][1.0]
        loss, drop = (
            max(loss for loss, _ in safe),
            min(a - b for (_, a), (_, b) in zip(safe, found[name][0.1], strict=True)),
        )
        claims += [
            Claim(
                f"{who}: after random pruning to the estimated {estimate.by_layer.safe:.1%} the training loss is zero.",
                "Yang et al. 2023, abstract; the estimate is ours",
                f"training loss under {LEARNED} in each of {DRAWS} networks",
                f"at most {loss:.2g}",
                loss < LEARNED,
            ),
            Claim(
                f"{who}: with a tenth of the estimated density signals are lost, and networks generalize worse, even "
                "if the training loss still falls.",
                "Yang et al. 2023, abstract; the estimate is ours",
                f"test accuracy at least {LOST} lower in each of {DRAWS} networks",
                f"at least {drop:.2f} lower",
                drop >= LOST,
            ),
        ]
    return tuple(claims)


def _exhibits(found: Found, estimates: Mapping[str, SafeSparsity]) -> tuple[Exhibit, ...]:
    def mean(name: str, multiple: float, of: int) -> float:
        return sum(pair[of] for pair in found[name][multiple]) / DRAWS

    about = (
        f"Means over {DRAWS} networks. The theory's network is that of the study pruned-fraction; digits: a perceptron "
        f"576-300-100-10, {STEPS} steps of Adam. 1: the density at which random masks cut no signal off, at "
        f"{next(iter(estimates.values())).confidence:.0%}, which is {{}}."
    ).format(", ".join(f"{1 - e.by_layer.safe:.1%} ({name})" for name, e in estimates.items()))
    x_title, scale = (
        "density, relative to the safe one (log scale, fewer to the right)",
        {"log_x": True, "falling_x": True},
    )
    figures = [
        lines_figure(
            {name: [(m, unit * mean(name, m, of)) for m in MULTIPLES] for name in found}, x_title, y_title, **scale
        )
        for of, unit, y_title in ((0, 1, "training loss (nats)"), (1, 100, "test accuracy (%)"))
    ]
    rows = [
        (f"{m:g}", *(f"{mean(name, m, 0):.3f}; {100 * mean(name, m, 1):.1f} %" for name in found)) for m in MULTIPLES
    ]
    return (
        Exhibit("Training loss", about, figures[0], claims=(0, 2)),
        Exhibit("Test accuracy", about, figures[1], claims=(1, 3)),
        Exhibit("Training loss; test accuracy", about, table=Table(("times the safe density", *found), rows)),
    )


STUDY = Study(
    name="safe-sparsity",
    title="The safe sparsity, estimated before training",
    question="Does the sparsity up to which no signal is cut off tell where training begins to fail?",
    source="Yang, Liang, Guo, Wu, Wang: Theoretical Characterization of How Neural Network Pruning Affects its "
    "Generalization, 2023",
    run=run,
)
