"""Two processes (gloo) must give the same masks as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = """
import sys, torch
import secateur as sc
from secateur.training.data import TensorBatches
from secateur.testing.toys import toy
torch.set_num_threads(1)
network = sys.argv[2]
model, x = toy(network)
model = model.double()
generator = torch.Generator().manual_seed(0)
data = TensorBatches(
    torch.randn(64, 3, 16, 16, generator=generator, dtype=torch.float64),
    torch.randint(0, 10, (64,), generator=generator),
    16,
)
results = {}
for granularity in ("weight", "channel"):
    pruned = sc.prune(
        model, x.double(), method="taylor", granularity=granularity, budget=sc.Budget(sparsity=0.5), data=data,
        schedule={"name": "cubic", "steps": 3, "end": 0.5}, recovery={"name": "fine-tune", "epochs": 2, "lr": 0.001},
    )
    kept = pruned.masks or {n: torch.tensor(a.kept) for n, a in pruned.structure_plan.axes.items()}
    results |= {f"{granularity}:{n}": m for n, m in kept.items()}
rank = int(__import__("os").environ.get("RANK", 0))
torch.save(results, f"{sys.argv[1]}-{rank}.pt")
"""


def run(folder: Path, name: str, network: str, processes: int) -> list[dict[str, torch.Tensor]]:
    script = folder / "job.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(folder / name), network],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(processes)]


def test_two_processes_find_the_masks_of_one(tmp_path):
    (alone,) = run(tmp_path, "one", "vit", 1)
    first, second = run(tmp_path, "two", "vit", 2)
    assert alone.keys() == first.keys() == second.keys() and len(alone) > 10
    for name, mask in alone.items():
        assert torch.equal(first[name], second[name]), f"the processes disagree on {name}"
        assert torch.equal(first[name], mask), f"two processes differ from one on {name}"


def test_two_processes_agree_where_batch_statistics_are_local(tmp_path):
    """Each process normalizes its half of a batch, so the result is not that of one process; but it is one result."""
    first, second = run(tmp_path, "two", "resnet20", 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
