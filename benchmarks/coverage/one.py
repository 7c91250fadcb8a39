"""Takes one network through all stages, in a process of its own: python -m benchmarks.coverage.one NAME FOLDER."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.coverage.zoo import build
from secateur.structure.inputs import as_inputs, output_tensors

BUDGET = 0.5


class Row:
    """What happened to one network: the result and the seconds of each stage, and the first failure."""

    def __init__(self, name: str) -> None:
        self.data: dict[str, Any] = {"name": name, "stages": {}, "seconds": {}, "failed": ""}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; what it raises ends the row."""
        start = perf_counter()
        try:
            yield
            self.data["stages"][name] = True
        except Exception as error:
            self.data["stages"][name] = False
            self.data["failed"] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise
        finally:
            self.data["seconds"][name] = round(perf_counter() - start, 3)


def run(name: str, folder: Path) -> Row:
    """Trace, verify, prune with proof, train one step, save; the files for `again` are left in `folder`."""
    row = Row(name)
    try:
        _stages(name, folder, row)
    except Exception:
        return row  # it says which stage failed and how
    return row


def _stages(name: str, folder: Path, row: Row) -> None:
    with row.stage("build"):
        model, inputs = build(name)
    row.data["params"] = sum(p.numel() for p in model.parameters())
    with row.stage("trace"):
        structure = sc.trace(model, inputs)
    row.data["prunable_share"] = round(prunable_share(structure), 4)
    with row.stage("verify"):
        verification = structure.verify(model)
        row.data["verify_error"] = verification.max_error
        if not verification.ok:
            raise RuntimeError(f"error {verification.max_error:.1e} {verification.reason} at {verification.failed[:6]}")
    with row.stage("prune"):
        pruned = sc.prune(model, inputs, granularity="channel", budget=sc.Budget(macs=BUDGET))
        row.data["macs"] = round(pruned.after.macs / pruned.before.macs, 4)
        row.data["proof"] = pruned.proofs[-1].max_error
        frozen = [a for a in pruned.structure.axes if "prove" in a.reason or "permuting" in a.reason]
        row.data["unproved"] = {axis.name: axis.reason for axis in frozen[:8]}
    with row.stage("step"):
        train_one_step(pruned.model, inputs)
    with row.stage("save"):
        pruned.model.eval()
        sc.save(pruned, folder / "pruned.safetensors")
        torch.save(output_tensors(call(pruned.model, inputs)), folder / "outputs.pt")


def prunable_share(structure: sc.Structure) -> float:
    """Return the share of the parameters of which at least one dim can be cut."""
    free = {name for axis in structure.prunable for name, _ in axis.members}
    sizes = {name: _numel(structure, name) for name in structure.parameters}
    return sum(size for name, size in sizes.items() if name in free) / max(sum(sizes.values()), 1)


def _numel(structure: sc.Structure, name: str) -> int:
    total = 1
    for dim in structure.tensors[name]:
        total *= dim.size
    return total


def call(model: nn.Module, inputs: Any) -> Any:
    """Return the output of a model without gradients."""
    arguments = as_inputs(inputs)
    with torch.no_grad():
        return model(*arguments.args, **arguments.kwargs)


def train_one_step(model: nn.Module, inputs: Any) -> None:
    """Take one optimizer step on the mean square of the outputs.

    Raises:
        RuntimeError: No gradient arrived, or it is not finite.
    """
    arguments = as_inputs(inputs)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4)
    outputs = output_tensors(model(*arguments.args, **arguments.kwargs))
    loss = sum(t.float().square().mean() for t in outputs if t.is_floating_point() and t.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    if not any(p.grad is not None for p in model.parameters()):
        raise RuntimeError("No gradient arrived.")


def again(name: str, folder: Path) -> Row:
    """Load the file of `run` in this process, which knows only the constructor, and export the network to ONNX."""
    row = Row(name)
    try:
        _, inputs = build(name)
        with row.stage("load"):
            model = sc.load(folder / "pruned.safetensors", build=lambda: build(name)[0])
            expected = torch.load(folder / "outputs.pt")
            for found, saved in zip(output_tensors(call(model, inputs)), expected, strict=True):
                torch.testing.assert_close(found, saved, rtol=1e-4, atol=1e-5)
        with row.stage("onnx"):
            from secateur.deploy import onnx

            onnx.export(model, inputs, folder / "pruned.onnx")
    except Exception:
        return row
    return row


if __name__ == "__main__":
    torch.set_num_threads(1)
    stages: Callable[[str, Path], Row] = again if sys.argv[1] == "again" else run
    sys.stdout.write("\n" + json.dumps(stages(sys.argv[2], Path(sys.argv[3])).data) + "\n")
