"""How many filters a sparse training empties: python -m benchmarks.empty_filters.

ResNet-8 on Fashion-MNIST at 98 % sparsity with ERK densities, 0.6 epochs from scratch: a mask that stays, one whose
weights move to random places (SET), one whose weights move to where the gradient is largest (RigL); three seeds.
"""

from __future__ import annotations

from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import over_seeds, write_record
from secateur.tasks import find_task

SEEDS = (0, 1, 2)
SPARSITY = 0.98
TRAINING = {"name": "fine-tune", "epochs": 0.6, "lr": 0.2, "weight_decay": 5e-4, "warmup": 0.15}
ARMS: dict[str, dict[str, Any]] = {
    "static mask": {"method": "random", "mask_from": "init", "weights_from": "init"},
    "set": {"method": "set"},
    "rigl": {"method": "rigl"},
}


def main() -> None:
    """Train every arm and write the record."""
    torch.set_num_threads(1)
    arms = [over_seeds(label, SEEDS, partial(run, settings)) for label, settings in ARMS.items()]
    shares = ", ".join(f"{arm['label']} {100 * fmean(arm['empty']):.0f} %" for arm in arms)
    claim = "filters without any weight left after a sparse training at 98 % sparsity"
    write_record(
        "empty_filters",
        {"claim": claim, "result": shares, "sparsity": SPARSITY, "training": TRAINING, "seeds": SEEDS, "arms": arms},
    )


def run(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Return the share of empty filters, and the validation accuracy."""
    task = find_task("fashion-mnist")
    torch.manual_seed(seed)
    pruned = sc.prune(
        task.build("resnet8"),
        task.example(),
        granularity="weight",
        allocation="erk",
        budget=sc.Budget(sparsity=SPARSITY),
        data=task.train_batches(seed),
        loss=task.loss,
        precision=task.precision,
        recovery=TRAINING,
        seed=seed,
        **settings,
    )
    filters = [m.weight.flatten(1).ne(0).any(1) for m in pruned.model.modules() if isinstance(m, nn.Conv2d)]
    return {
        "empty": 1 - float(torch.cat(filters).float().mean()),
        "validation_accuracy": task.validation_accuracy(pruned.model),
    }


if __name__ == "__main__":
    main()
