"""Taylor scores beside the true change of the loss: python -m benchmarks.taylor_oracle.

For every fourth channel of the digits reference the loss is computed with that channel absent, and the squared change
is rank-correlated with the Taylor score: on training images (which the network knows by heart), on the same images
shifted as in training, and on held-out ones.
"""

from __future__ import annotations

import torch
from scipy.stats import spearmanr
from torch import nn

import secateur as sc
from benchmarks import write_record
from secateur.core.slots import Scope
from secateur.methods.taylor import Taylor
from secateur.parts.granularity.channel import Channel, ChannelUnits
from secateur.structure.inputs import Inputs, state_of, undisturbed
from secateur.structure.masked import run_masked
from secateur.tasks import find_task
from secateur.tasks.reference import load_reference
from secateur.tasks.task import Split, Task

STRIDE = 4


def main() -> None:
    """Correlate on both splits and write the record."""
    task = find_task("digits")
    model = load_reference(task)
    units = Channel().units(model, task.example(), Scope())
    train, held_out = (Split(s.inputs[:256], s.targets[:256]) for s in (task.splits.train, task.splits.validation))
    assert task.augment is not None
    shifted = Split(task.augment(train.inputs, torch.Generator().manual_seed(0)), train.targets)
    splits = {"training images": train, "shifted training images": shifted, "held-out images": held_out}
    correlations = {name: correlate(model, units, task, split) for name, split in splits.items()}
    write_record("taylor_oracle", {"spearman": correlations, "images": 256, "stride": STRIDE})


def correlate(model: nn.Module, units: ChannelUnits, task: Task, split: Split) -> dict[str, float]:
    """Return the rank correlation of score and oracle on each axis."""
    x, y = split.inputs, split.targets
    scores = Taylor().score(sc.Context(units, [(x, y)], task.loss))
    found = {}
    with undisturbed(model):
        full = task.loss(model(x), y)
        for axis in units.structure.prunable:
            chosen = range(0, axis.size, STRIDE)
            changes = []
            for unit in chosen:
                kept = {axis.name: torch.arange(axis.size) != unit}
                output = run_masked(model, units.structure, kept, state_of(model), Inputs((x,), {}))
                changes.append(float((task.loss(output, y) - full) ** 2))
            found[axis.name] = round(float(spearmanr(changes, scores[axis.name][::STRIDE].tolist()).statistic), 3)
    return found


if __name__ == "__main__":
    main()
