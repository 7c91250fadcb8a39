"""Takes one network through all stages, each within a limit of time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.coverage.judge import judge, tag
from benchmarks.coverage.processes import within
from benchmarks.coverage.zoo import build
from secateur.errors import NotApplicable
from secateur.optional import optional_import
from secateur.structure.inputs import as_inputs, output_tensors, relative_error

BUDGET = 0.5
SECONDS = 600
"""Limit of each stage."""
ONNX_TOLERANCE = 1e-3
LOAD_TOLERANCE = 1e-4


class Row:
    """What happened to one network: the result and the seconds of each stage, and the first failure."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {"stages": {}, "seconds": {}, "failed": ""}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; what it raises ends the row."""
        start = process_time()
        try:
            with within(SECONDS):
                yield
            self.data["stages"][name] = True
        except Exception as error:
            self.data["stages"][name] = False
            self.data["failed"] = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise
        finally:
            self.data["seconds"][name] = round(process_time() - start, 3)


def run(model: nn.Module, inputs: Any, folder: Path) -> dict[str, Any]:
    """Trace, verify, prune with proof, let the judge see it, train one step, save; leave the files for `again`."""
    row = Row()
    try:
        _stages(model, inputs, folder, row)
    except Exception:
        return row.data  # it says which stage failed and how
    return row.data


def _stages(model: nn.Module, inputs: Any, folder: Path, row: Row) -> None:
    tag(model)
    row.data["params"] = sum(p.numel() for p in model.parameters())
    with row.stage("trace"):
        structure = sc.trace(model, inputs)
    row.data["prunable_share"] = round(prunable_share(structure), 4)
    with row.stage("verify"):
        verification = structure.verify(model)
        row.data["verify_error"] = verification.max_error
        if not verification.ok:
            failed = list(verification.failed.items())[:6]
            raise RuntimeError(f"error {verification.max_error:.1e} {verification.reason} at {failed}")
    with row.stage("prune"):
        pruned = sc.prune(model, inputs, granularity="channel", budget=sc.Budget(macs=BUDGET))
        row.data["macs"] = round(pruned.after.macs / pruned.before.macs, 4)
        row.data["proof"] = pruned.proofs[-1].max_error
        frozen = [a for a in pruned.structure.axes if "prove" in a.reason or "permuting" in a.reason]
        row.data["unproved"] = {axis.name: axis.reason for axis in frozen[:8]}
    with row.stage("right"):
        right, row.data["judge_error"] = judge(model, copy.deepcopy(pruned.model), structure)
        if not right:
            raise RuntimeError(f"the cut network differs from the masked one by {row.data['judge_error']:.1e}")
    with row.stage("step"):
        train_one_step(pruned.model, inputs)
    with row.stage("save"):
        pruned.model.eval()
        sc.save(pruned, folder / "pruned.safetensors")
        torch.save(exact_outputs(pruned.model, inputs), folder / "outputs.pt")


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


def exact_outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Return the outputs in float64, because some networks with generic weights amplify rounding without limit.

    Code that insists on float32 runs in float32. What a model draws at random is drawn equally each time.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return output_tensors(call(copy.deepcopy(model).double(), as_inputs(inputs).to(torch.float64)))
        except RuntimeError:
            return output_tensors(call(model, inputs))


def train_one_step(model: nn.Module, inputs: Any) -> None:
    """Take one optimizer step on the mean square of the outputs.

    Raises:
        RuntimeError: No gradient arrived.
    """
    arguments = as_inputs(inputs)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-4)
    outputs = output_tensors(model(*arguments.args, **arguments.kwargs))
    loss = sum(t.float().square().mean() for t in outputs if t.is_floating_point() and t.requires_grad)
    loss.backward()  # type: ignore[union-attr]
    optimizer.step()
    if not any(p.grad is not None for p in model.parameters()):
        raise RuntimeError("No gradient arrived.")


def again(name: str, inputs: Any, folder: Path) -> dict[str, Any]:
    """Load the file of `run` in a process that knows only the constructor, export the network to ONNX and run that."""
    row = Row()
    try:
        with row.stage("load"):
            model = sc.load(folder / "pruned.safetensors", build=lambda: build(name)[0])
            expected = torch.load(folder / "outputs.pt")
            error = relative_error(exact_outputs(model, inputs), expected)
            if error > LOAD_TOLERANCE:
                raise RuntimeError(f"the loaded network's output differs by {error:.1e}")
        with row.stage("onnx"):
            export(model, inputs, folder / "pruned.onnx")
    except NotApplicable:
        row.data["failed"] += (
            f" (the dense network {'can' if exports(build(name)[0], inputs, folder) else 'cannot, either'})"
        )
    except Exception:
        return row.data
    return row.data


def exports(model: nn.Module, inputs: Any, folder: Path) -> bool:
    """Return whether a network can be exported to ONNX."""
    from secateur.deploy import onnx

    try:
        onnx.export(model, inputs, folder / "dense.onnx")
    except NotApplicable:
        return False
    return True


def export(model: nn.Module, inputs: Any, path: Path) -> None:
    """Export a network to ONNX.

    Raises:
        RuntimeError: ONNX Runtime computes something else.
    """
    from secateur.deploy import onnx

    onnx.export(model, inputs, path)
    session = optional_import("onnxruntime", "onnx").InferenceSession(path, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(array) for array in session.run(None, onnx.feed(path, as_inputs(inputs)))]
    ours = output_tensors(call(model, inputs))
    rounding = relative_error(ours, exact_outputs(model, inputs))  # generic weights can amplify it without limit
    error = relative_error(found, ours)
    if error > max(ONNX_TOLERANCE, 10 * rounding):
        raise RuntimeError(f"ONNX Runtime's output differs from PyTorch's by {error:.1e}.")
