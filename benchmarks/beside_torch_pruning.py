"""Time to cut a network in half, beside Torch-Pruning: python -m benchmarks.beside_torch_pruning.

Both get the same network and the same example input, and leave the network that they were given as it was. Ours
traces, verifies by permutation, scores (L2, global), cuts to half of the multiply-adds, and proves the cut.
Torch-Pruning builds its graph, scores (L2, global) and removes half of the channels; it proves nothing. Needs timm and
torch-pruning.

Both are measured in turn, in the CPU time of this process on one thread: on a machine that others use, wall time says
more about them. Garbage is collected before each run and not during it, as `timeit` does it: what that would take
depends on all that was imported.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks import write_record
from benchmarks.coverage.zoo import allow_torchvision

ROUNDS = 5
NETWORKS = {"resnet50": 3.0, "vit_base_patch16_224": 1.0}
"""timm network -> the allowed ratio."""


def main() -> None:
    """Measure both in turn and write the record."""
    allow_torchvision()
    import timm

    warnings.filterwarnings("ignore", module="torch_pruning")
    torch.set_num_threads(1)
    networks = {}
    for name, limit in NETWORKS.items():
        torch.manual_seed(0)
        model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
        ours, theirs = _in_turn(lambda m=model, x=x: secateur(m, x), lambda m=model, x=x: torch_pruning(m, x))  # type: ignore[misc]
        networks[name] = {
            "ratio": round(median(ours) / median(theirs), 3),
            "limit": limit,
            "secateur_s": [round(t, 3) for t in ours],
            "torch_pruning_s": [round(t, 3) for t in theirs],
        }
    claim = "CPU time to analyse, prove and cut {}, relative to Torch-Pruning, which proves nothing (at most 3 and 1)"
    write_record(
        "beside_torch_pruning",
        {
            "claim": claim.format("ResNet-50 and ViT-B/16"),
            "result": " and ".join(f"{case['ratio']:.2f}" for case in networks.values()),
            "networks": networks,
        },
    )


def _in_turn(*runs: Callable[[], object]) -> list[list[float]]:
    """Return the CPU times of each, after one run of each to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(ROUNDS + 1):
        for own, run in zip(times, runs, strict=True):
            gc.collect()
            gc.disable()
            start = process_time()
            run()
            taken = process_time() - start
            gc.enable()
            if i > 0:
                own.append(taken)
    return times


def secateur(model: nn.Module, x: Tensor) -> sc.Pruned:
    """Halve the multiply-adds, with proofs."""
    return sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5))


def torch_pruning(model: nn.Module, x: Tensor) -> nn.Module:
    """Remove half of the channels; the classifier's outputs stay, and the number of heads is given."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    pruner = tp.pruner.MagnitudePruner(
        small,
        x,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=0.5,
        ignored_layers=[small.get_classifier()],  # type: ignore[operator]
        num_heads={m.qkv: m.num_heads for m in small.modules() if hasattr(m, "qkv")},
    )
    pruner.step()
    return small


if __name__ == "__main__":
    main()
