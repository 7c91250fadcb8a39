"""Files that leave the laboratory: safetensors with a plan, ONNX, torch.export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Artifact:
    """A written file.

    Attributes:
        path: Where it is.
        format: ``onnx``, ``pt2`` or ``safetensors``.
        bytes: Its size.
    """

    path: Path
    format: str
    bytes: int
