"""What each method costs beside plain training: python -m benchmarks.method_costs.

Each method prunes ResNet-20 (28x28 images, batches of 128) once, with one epoch of recovery. Its calls of `score` are
timed and their memory is measured, and so are the training steps, in which the hooks of some methods work. All is of
one processor thread, and relative to an epoch of the same network without any pruning.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import secateur as sc
from benchmarks import write_record
from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks.networks import build_network
from secateur.training.data import TensorBatches
from secateur.training.loop import Trainer

BATCHES, BATCH = 6, 128
TRAINING = FineTune(epochs=1, lr=0.01)


class Meter:
    """Adds up time and peak memory of calls, and the samples that the network saw meanwhile."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.samples, self.calls = 0.0, 0, 0, 0
        self.running = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, measured."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            before = _reset_peak()
            self.running, start = True, process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += process_time() - start
                self.running = False
                self.bytes = max(self.bytes, _memory("VmHWM") - before)
                self.calls += 1

        return measured

    @contextmanager
    def counting(self, channels: int) -> Any:
        """Count the images, of so many channels, that go through any network while a measured call runs."""

        def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self.running and isinstance(module, nn.Conv2d) and module.in_channels == channels:  # the first layer
                self.samples += len(inputs[0])

        handle = nn.modules.module.register_module_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()


def main() -> None:
    """Measure all methods and write the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    n = BATCHES * BATCH
    data = TensorBatches(torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,)), batch_size=BATCH)
    model = build_network("resnet20", 16, 28).eval()
    plain = training(model, data)
    print(f"plain training: {plain.seconds:.2f} s per epoch, {plain.bytes / 2**20:.0f} MB")
    rows = {}
    for card in sc.methods():
        rows[card.name] = row = costs(card, model, data, plain)
        print(card.name, row, flush=True)
    write_record(
        "method_costs",
        {
            "claim": "costs of all methods, relative to plain training",
            "result": f"{len(rows)} methods",
            "network": "resnet20, 28x28, batches of 128",
            "epoch_s": round(plain.seconds, 3),
            "epoch_bytes": plain.bytes,
            "methods": rows,
        },
    )


def training(model: nn.Module, data: TensorBatches) -> Meter:
    """Return what an epoch of plain training costs, the second one: the first warms up."""
    for _ in range(2):
        meter = Meter()
        copy = build_network("resnet20", 16, 28)
        copy.load_state_dict(model.state_dict())
        meter.around(Trainer(copy, TRAINING).run)(data, 0, len(data))
    return meter


def costs(card: sc.Card, model: nn.Module, data: TensorBatches, plain: Meter) -> dict[str, float | int]:
    """Return the costs of one method."""
    recipe = sc.method(card.name).recipe
    granularity = granularity_of(card)
    budget = {"weight": sc.Budget(sparsity=0.9), "branch": sc.Budget(macs=0.8)}.get(granularity, sc.Budget(macs=0.5))
    scoring, steps = Meter(), Meter()
    criterion = type(recipe.criterion)
    run = Trainer.run
    with (
        scoring.counting(channels=1),
        patch.object(criterion, "score", scoring.around(criterion.score)),
        patch.object(Trainer, "run", steps.around(run)),
    ):
        sc.prune(
            model,
            torch.zeros(1, 1, 28, 28),
            method=card.name,
            granularity=granularity,
            budget=budget,
            data=data,
            checkpoints={"init": model.state_dict()},
            recovery=TRAINING,
        )
    return {
        "passes": round(scoring.samples / (BATCHES * BATCH), 2),
        "score_per_epoch": round(scoring.seconds / plain.seconds, 2),
        "score_memory": round(scoring.bytes / plain.bytes, 2),
        "training_memory": round(steps.bytes / plain.bytes, 2),
        "training_time": round(steps.seconds / plain.seconds, 2),
    }


def granularity_of(card: sc.Card) -> str:
    """Return the units with which a method is measured."""
    return next(g for g in ("channel", "weight", *card.granularity) if g in card.granularity)


def _reset_peak() -> int:
    """Forget the peak of memory so far, and return what is in use, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
