"""Channels per input beside channels that are removed, at the same MACs: python -m benchmarks.fbs_on_digits.

ResNet-8 on digits, at most 25 % of the MACs, the same training for all; three seeds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import secateur as sc
from benchmarks import over_seeds, write_record
from secateur.measure.profile import macs_per_sample
from secateur.tasks import find_task
from secateur.tasks.reference import load_reference

SEEDS = (0, 1, 2)
MACS = 0.25
RECOVERY = {"name": "fine-tune", "epochs": 4, "lr": 0.05}
STATIC = {"granularity": "channel", "allocation": "uniform"}
ARMS: dict[str, dict[str, Any]] = {
    "fbs": {"method": "fbs"},
    "fbs, deviation 0": {"method": "fbs", "criterion": {"name": "fbs", "deviation": 0}},
    "magnitude, channels removed": {"method": "magnitude", **STATIC},
    "random, channels removed": {"method": "random", **STATIC},
}


def main() -> None:
    """Run every arm and write the record."""
    torch.set_num_threads(1)
    task = find_task("digits")
    arms = [over_seeds(label, SEEDS, partial(run, settings)) for label, settings in ARMS.items()]
    dense = task.test_accuracy(load_reference(task))
    write_record("fbs_on_digits", {"dense": dense, "macs": MACS, "recovery": RECOVERY, "seeds": SEEDS, "arms": arms})


def run(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Return the test accuracy of one run, and its share of the MACs: at most, and on average over the test images."""
    task = find_task("digits")
    pruned = sc.prune(
        load_reference(task),
        task.example(),
        budget=sc.Budget(macs=MACS),
        data=task.train_batches(seed),
        loss=task.loss,
        recovery=RECOVERY,
        seed=seed,
        **settings,
    )
    taken = macs_per_sample(pruned.model, task.splits.test.inputs)
    return {
        "test_accuracy": task.test_accuracy(pruned.model),
        "macs_at_most": pruned.after.effective_macs / pruned.before.macs,
        "macs_on_average": float(taken.mean()) / pruned.before.macs,
    }


if __name__ == "__main__":
    main()
