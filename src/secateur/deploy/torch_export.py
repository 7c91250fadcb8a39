"""Export with ``torch.export``: a file that runs without the model's class."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.atomic import written_atomically
from secateur.deploy import Artifact
from secateur.errors import NotApplicable
from secateur.structure.inputs import as_inputs, undisturbed


def export(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> Artifact:
    """Write `model` as a ``.pt2`` file for the shapes of the example inputs.

    Raises:
        NotApplicable: PyTorch cannot export this model; the message says why.
    """
    inputs = as_inputs(example_inputs)
    with undisturbed(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, inputs.args, dict(inputs.kwargs))
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise NotApplicable(f"torch.export cannot export the model: {type(error).__name__}: {reason}") from error
        with written_atomically(path) as temporary:
            torch.export.save(program, os.fspath(temporary))
    return Artifact(Path(path), "pt2", Path(path).stat().st_size)
