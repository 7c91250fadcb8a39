"""``secateur export``: a pruned network for other engines."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.common import JsonOption, call_for_model, console, inputs_for, print_json


class Format(StrEnum):
    """What can be written."""

    onnx = "onnx"
    pt2 = "pt2"


def command(
    file: Annotated[Path, typer.Argument(help="A .safetensors file that secateur wrote.")],
    build: Annotated[str, typer.Option(help="module:function (or timm:NAME ...) that makes the original network.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default: beside FILE.")] = None,
    format: Annotated[Format, typer.Option(help="ONNX, or PyTorch's own .pt2.")] = Format.onnx,
    shape: Annotated[str | None, typer.Option(help="Shape of the input, for example 1,3,224,224.")] = None,
    example: Annotated[str | None, typer.Option(help="module:function that returns example inputs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Export a saved network to ONNX or .pt2."""
    from secateur.api import load
    from secateur.deploy import onnx, torch_export

    model = load(file, lambda: call_for_model(build))
    inputs = inputs_for(build, model, shape, example)
    exporter = onnx if format is Format.onnx else torch_export
    artifact = exporter.export(model, inputs, out or file.with_suffix(f".{format}"))
    if as_json:
        print_json({"path": str(artifact.path), "format": artifact.format, "bytes": artifact.bytes})
    else:
        console.print(f"Wrote {artifact.path} ({artifact.bytes:,} bytes).", markup=False)
