"""Criteria under equal recovery on the digits task: python -m benchmarks.criteria_on_digits.

ResNet-8, channels in multiples of 8, at most 30 % of the MACs, one shot; three seeds; two recovery budgets.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

import secateur as sc
from benchmarks import write_record
from secateur.tasks import find_task
from secateur.tasks.reference import load_reference

SEEDS = (0, 1, 2)
EPOCHS = (0, 1, 2, 4)
MEAN = {"name": "global", "normalize": "mean"}
ARMS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "random, uniform": {"method": "random", "allocation": "uniform"},
    "magnitude, L2": {"method": "magnitude"},
    "magnitude, L1": {"method": "magnitude", "criterion": {"name": "magnitude", "p": 1}},
    "magnitude, L2, uniform": {"method": "magnitude", "allocation": "uniform"},
    "taylor, gate": {"method": "taylor"},
    "taylor, weight": {"method": "taylor", "criterion": {"name": "taylor", "at": "weight"}},
    "taylor, gate, uniform": {"method": "taylor", "allocation": "uniform"},
    'taylor, gate, "global"': {"method": "taylor", "allocation": "global"},
}


def main() -> None:
    """Run every arm in two processes of one thread each, and write the record."""
    jobs = [(arm, epochs, seed) for arm in ARMS for epochs in EPOCHS for seed in SEEDS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        found = dict(zip(jobs, pool.map(run, *zip(*jobs, strict=True)), strict=True))
    arms = [
        {
            "label": arm,
            "method": settings["method"],
            "test_accuracy": {str(epochs): [found[arm, epochs, seed][0] for seed in SEEDS] for epochs in EPOCHS},
            "macs": found[arm, EPOCHS[0], SEEDS[0]][1],
        }
        for arm, settings in ARMS.items()
    ]
    task = find_task("digits")
    dense = {"test_accuracy": task.test_accuracy(load_reference(task)), "data": task.digest, "version": task.version}
    write_record("criteria_on_digits", {"dense": dense, "seeds": SEEDS, "epochs": EPOCHS, "arms": arms})


def run(arm: str, epochs: float, seed: int) -> tuple[float, float]:
    """Return test accuracy and kept share of the MACs of one run."""
    task = find_task("digits")
    pruned = sc.prune(
        load_reference(task),
        task.example(),
        budget=sc.Budget(macs=0.3),
        data=task.train_batches(seed),
        loss=task.loss,
        granularity={"name": "channel", "round_to": 8},
        recovery={"name": "fine-tune", "epochs": epochs, "lr": 0.02} if epochs else "none",
        seed=seed,
        **ARMS[arm],
    )
    return task.test_accuracy(pruned.model), pruned.after.macs / pruned.before.macs


if __name__ == "__main__":
    main()
