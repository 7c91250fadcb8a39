"""What scores take on ResNet-50 at the shapes of ImageNet: python -m benchmarks.resnet50_scoring [ARM ...].

Each method scores the network once (224x224 images in batches of 8) in a process of its own, with one thread. Its peak
of memory is compared with that of a training step on such a batch, and its time with that of the bare passes that its
formula needs. Methods that learn their scores in training are not here: they have nothing to score without it. Nor are
those that take the scores of another method.
"""

from __future__ import annotations

import copy
import ctypes
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from benchmarks import RESULTS, write_record
from benchmarks.method_costs import Meter, granularity_of
from benchmarks.networks import resnet50
from secateur.budgets import cost_of
from secateur.core.engine import Run
from secateur.core.recipe import Recipe
from secateur.core.slots import Scope

NAME, BATCHES, BATCH, SIDE = "resnet50_scoring", 2, 8, 224
VARIANTS = {
    "taylor order=2": ("taylor", {"name": "taylor", "order": 2, "at": "weight"}),
    "snip force=10": ("snip", {"name": "snip", "force": 10}),
}
"""Arm -> method and criterion, beside those of all recipes."""
M_MMAP_THRESHOLD = -3
"""Of the C library: tensors of this size or more get memory of their own."""
Batch = tuple[Tensor, Tensor]


class Needs(NamedTuple):
    """How many times a formula needs each kind of pass over the data."""

    forward: int = 0
    gradient: int = 0
    """Forward and backward."""
    curvature: int = 0
    """A product of the Hessian: forward, backward with its graph, and backward through both."""

    @property
    def passes(self) -> int:
        """How many times samples go through the network."""
        return sum(self)


NEEDS = {
    "cka": Needs(forward=13),  # without each of the 12 branches beside an identity, and with all
    "fisher": Needs(gradient=1),
    "fusion": Needs(forward=24),  # with and without each of them
    "grasp": Needs(gradient=1, curvature=1),
    "lasso": Needs(forward=1),
    "sbp": Needs(gradient=1),
    "scop": Needs(forward=20, gradient=20),  # in each epoch the knockoffs, and the images
    "snip": Needs(gradient=1),
    "snip force=10": Needs(gradient=10),
    "taylor": Needs(gradient=1),
    "taylor order=2": Needs(curvature=1),
    "thinet": Needs(forward=1),
}


def main() -> None:
    """Measure the named arms, or all, and write them into the record."""
    criteria = {card.name: sc.method(card.name).recipe.criterion for card in sc.methods()}
    own = [name for name, criterion in criteria.items() if criterion.name == name and not criterion.learns]
    names = sys.argv[1:] or [*own, *VARIANTS]
    found: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, row in pool.imap(measured, names):
            found[name] = row
            print(name, row, flush=True)
    rows = {**recorded(), **found}
    worst = {key: max((row[key] or 0.0) for row in rows.values()) for key in ("memory", "passes")}
    write_record(
        NAME,
        {
            "claim": "scores of ResNet-50 at the shapes of ImageNet: most memory of any method, relative to a training "
            "step, and most passes, relative to those that the formula needs (at most 3 and 1.25)",
            "result": f"{worst['memory']:.2f} and {worst['passes']:.2f}",
            "network": f"resnet50, {SIDE}x{SIDE}, batches of {BATCH}",
            "arms": dict(sorted(rows.items())),
        },
    )


def recorded() -> dict[str, Any]:
    """Return the arms of the record, if there is one."""
    path = RESULTS / f"{NAME}.json"
    arms: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["arms"] if path.exists() else {}
    return arms


def measured(arm: str) -> tuple[str, dict[str, Any]]:
    """Return the name of an arm and what its scores cost; called in a process of its own."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)  # freed tensors go back to the system, so that peaks are true
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet50().eval()
    data = [(torch.randn(BATCH, 3, SIDE, SIDE), torch.randint(0, 1000, (BATCH,))) for _ in range(BATCHES)]
    method, criterion = VARIANTS.get(arm, (arm, None))
    recipe = sc.method(method).but(granularity=granularity_of(sc.method(method).card), criterion=criterion)
    needs = NEEDS.get(arm, Needs())
    gradient = seconds_of(gradients, model, data)
    step = Meter()
    step.around(training_step)(copy.deepcopy(model), *data[0])
    scoring = scored(recipe, model, data)
    bare = needs.gradient * gradient
    bare += needs.forward * seconds_of(outputs, model, data) if needs.forward else 0
    bare += needs.curvature * seconds_of(curvatures, model, data) if needs.curvature else 0
    passes = scoring.samples / (BATCHES * BATCH)
    return arm, {
        "method": method,
        "granularity": recipe.granularity.name,
        "samples_seen": round(passes, 2),
        "needed": {kind: n for kind, n in needs._asdict().items() if n},
        "passes": round(passes / needs.passes, 3) if needs.passes else None,
        "time": round(scoring.seconds / gradient, 3),
        "time_over_needed": round(scoring.seconds / bare, 3) if bare else None,
        "memory": round(scoring.bytes / step.bytes, 3),
        "memory_bytes": scoring.bytes,
        "step_bytes": step.bytes,
        "pass_s": round(gradient, 2),
    }


def scored(recipe: Recipe, model: nn.Module, data: list[Batch]) -> Meter:
    """Return what one call of `score` costs, without the analysis of the network."""
    meter = Meter()
    units = recipe.granularity.units(model, torch.zeros(1, 3, SIDE, SIDE), Scope())
    run = Run(recipe, units, sc.Budget(sparsity=0.8), cost_of("sparsity"), data=data)  # FORCE chooses while it scores
    with meter.counting(channels=3):
        meter.around(recipe.criterion.score)(sc.Context(units, data, keep=0.2, choose=run.choose))
    return meter


def seconds_of(passes: Callable[[nn.Module, list[Batch]], None], model: nn.Module, data: list[Batch]) -> float:
    """Return the time of passes over all data, by the median of three over the first batch."""
    times = []
    for _ in range(3):
        meter = Meter()
        meter.around(passes)(model, data[:1])
        times.append(meter.seconds)
    return median(times) * len(data)


def outputs(model: nn.Module, data: Iterable[Batch]) -> None:
    """One forward pass."""
    with torch.inference_mode():
        for x, _ in data:
            model(x)


def gradients(model: nn.Module, data: Iterable[Batch]) -> None:
    """One forward and one backward pass."""
    for x, y in data:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


def curvatures(model: nn.Module, data: Iterable[Batch]) -> None:
    """One product of the Hessian of the loss with a vector."""
    kernels = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    for x, y in data:
        first = torch.autograd.grad(F.cross_entropy(model(x), y), kernels, create_graph=True)
        slope = torch.stack([(g * w.detach()).sum() for g, w in zip(first, kernels, strict=True)]).sum()
        torch.autograd.grad(slope, kernels)


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One step of SGD with momentum, the first; mutates the model."""
    sgd = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
    F.cross_entropy(model(x), y).backward()
    sgd.step()


if __name__ == "__main__":
    main()
