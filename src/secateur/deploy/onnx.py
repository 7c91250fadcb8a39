"""Export to ONNX."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.atomic import written_atomically
from secateur.deploy import Artifact
from secateur.deploy.onnx_operations import translations
from secateur.errors import NotApplicable
from secateur.optional import optional_import
from secateur.structure.inputs import Inputs, as_inputs, undisturbed


def export(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> Artifact:
    """Write `model` as one ONNX file; the first dim of every input may vary where the model allows it.

    Raises:
        MissingDependency: The extra ``onnx`` is not installed.
        NotApplicable: PyTorch cannot export this model; the message says why.
    """
    optional_import("onnxscript", "onnx")
    inputs = as_inputs(example_inputs)
    with undisturbed(model), _quiet():
        try:
            program = _program(model, inputs, dynamic_batch=True)
        except Exception:
            try:
                program = _program(model, inputs, dynamic_batch=False)
            except Exception as error:
                raise NotApplicable(f"The model cannot be exported to ONNX: {_first_cause(error)}") from error
    with written_atomically(path) as temporary:
        program.save(os.fspath(temporary), external_data=False)
    return Artifact(Path(path), "onnx", Path(path).stat().st_size)


def feed(path: Path, inputs: Inputs) -> dict[str, Any]:
    """Return the example inputs by the names that the ONNX file gives them, as NumPy arrays."""
    onnx = optional_import("onnx", "onnx")
    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    tensors = inputs.tensors()
    return {node.name: tensor.numpy(force=True) for node, tensor in zip(graph.input, tensors, strict=True)}


def _program(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> Any:
    shapes = None
    if dynamic_batch:
        mark = {0: torch.export.Dim.DYNAMIC}
        shapes = tree_map(
            lambda v: mark if isinstance(v, Tensor) and v.dim() else None, (inputs.args, dict(inputs.kwargs))
        )
        shapes = shapes[0] if not inputs.kwargs else shapes[1] if not inputs.args else None
    return torch.onnx.export(
        model,
        inputs.args,
        kwargs=dict(inputs.kwargs),
        dynamo=True,
        dynamic_shapes=shapes,
        custom_translation_table=translations(),
        verbose=False,
    )


def _first_cause(error: BaseException) -> str:
    """Return what went wrong first; the exporter wraps it in messages about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's warnings about its own dependencies."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
