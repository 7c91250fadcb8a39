"""Time to cut a network in half, beside Torch-Pruning: python -m benchmarks.beside_torch_pruning.

Both get the same network and the same example input, and leave the network that they were given as it was. Ours
traces, scores (L2, global), and cuts to half of the multiply-adds with one proof of the analysis and the cut together.
Torch-Pruning builds its graph, scores (L2, global) and removes half of the channels; it proves nothing. Needs timm and
torch-pruning.

Both are measured in turn, in CPU time on one thread: on a machine that others use, wall time says more about them. Each
has processes of its own, because what one allocates decides how fast memory comes to the other. Garbage is collected
before each run and not during it, as `timeit` does it.
"""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks import write_record
from benchmarks.coverage.zoo import allow_torchvision

PROCESSES, ROUNDS = 2, 3
NETWORKS = {"resnet50": 3.0, "vit_base_patch16_224": 1.0}
"""timm network -> the allowed ratio."""


def main() -> None:
    """Measure both in turn and write the record."""
    networks = {}
    for name, limit in NETWORKS.items():
        times: dict[str, list[float]] = {tool: [] for tool in ("secateur", "torch_pruning")}
        for _ in range(PROCESSES):
            for tool, own in times.items():
                own += _in_own_process(tool, name)
        ratio = round(median(times["secateur"]) / median(times["torch_pruning"]), 3)
        networks[name] = {"ratio": ratio, "limit": limit, **{f"{tool}_s": own for tool, own in times.items()}}
    claim = "CPU time to analyse, prove and cut {}, relative to Torch-Pruning, which proves nothing (at most 3 and 1)"
    write_record(
        "beside_torch_pruning",
        {
            "claim": claim.format("ResNet-50 and ViT-B/16"),
            "result": " and ".join(f"{case['ratio']:.2f}" for case in networks.values()),
            "networks": networks,
        },
    )


def _in_own_process(tool: str, name: str) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.beside_torch_pruning", tool, name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    times: list[float] = json.loads(done.stdout.splitlines()[-1])
    return times


def measure(tool: str, name: str) -> list[float]:
    """Return the CPU seconds of a few runs, after one to warm up."""
    allow_torchvision()
    import timm

    warnings.filterwarnings("ignore", module="torch_pruning")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 224, 224)
    run: Callable[[nn.Module, Tensor], object] = {"secateur": secateur, "torch_pruning": torch_pruning}[tool]
    times = []
    for _ in range(ROUNDS + 1):
        gc.collect()
        gc.disable()
        start = process_time()
        run(model, x)
        times.append(round(process_time() - start, 3))
        gc.enable()
    return times[1:]


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
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(measure(sys.argv[1], sys.argv[2])) + "\n")
    else:
        main()
