"""Proof by a twin: a network too large to run is verified on a small one that the same code makes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from secateur.structure.dims import Dim, flat, leaves
from secateur.structure.structure import Structure
from secateur.structure.trace import trace
from secateur.structure.verify import Verification


def verify_by_twin(
    structure: Structure,
    twin: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Verification:
    """Return whether `structure` holds, as far as a small network of the same configuration shows.

    The twin is traced on its own inputs. Its structure must be the same up to sizes and to the number of repeated
    layers: the same axes with the same roles, the same expressions for every tensor, the same ties and attributes. Then
    the twin's structure is verified.

    Args:
        structure: What `trace` said about the large network, which may be on the meta device.
        twin: A network of the same class with smaller sizes, and at least two of each repeated layer. Sizes that are
            larger than 1 in the large network must be so in the twin.
        example_inputs: Inputs of the twin.
        example_kwargs: Further keyword arguments of the twin.
        seed: Controls the random parameters and orders.

    Returns:
        The twin's verification; not ok, with a reason, if the two structures differ.

    Raises:
        InvalidInputs: The twin does not run on these inputs.
    """
    small = trace(twin, example_inputs, example_kwargs)
    ours, theirs = set(_outline(structure)), set(_outline(small))
    for lines, whose in ((ours - theirs, "the large network"), (theirs - ours, "the twin")):
        if lines:
            reason = f"the two structures differ: only {whose} has: {min(lines)}"
            return Verification(float("inf"), ok=False, reason=reason)
    return small.verify(twin, seed)


def _outline(structure: Structure) -> Iterator[str]:
    """Yield what must be the same, one line each, without sizes and with layer numbers made relative."""
    names = {axis.leaf: axis.name for axis in structure.axes}
    for axis in structure.axes:
        steps = " in steps" if axis.name in structure.steps else ""
        yield f"axis {_pattern(axis.name)}: {axis.role} {'free' if axis.prunable else 'frozen'}{steps}"
    for tensor, dims in structure.tensors.items():
        yield f"tensor {_pattern(tensor)}: {', '.join(_expression(dim, names, tensor) for dim in dims)}"
    for attribute, dim in structure.attributes.items():
        if any(leaf in names for leaf in leaves(dim)):
            yield f"attribute {_pattern(str(attribute))}: {_expression(dim, names, str(attribute))}"
    for tie in structure.ties:
        yield f"tie {', '.join(sorted({_pattern(name) for name in tie}))}"


def _expression(dim: Dim, names: Mapping[Dim, str], near: str) -> str:
    dim = dim.find()
    if not dim.op:
        return _pattern(names[dim], near) if dim in names else "1" if dim.size == 1 else "fixed"
    return "(" + f" {dim.op} ".join(_expression(part, names, near) for part in flat(dim, dim.op)) + ")"


def _pattern(name: str, near: str = "") -> str:
    """Return a name without its layer numbers: ``=`` where the name `near` it has the same number, else ``*``."""
    path, rest = re.fullmatch(r"([^:#\[]*)(.*)", name).groups()  # type: ignore[union-attr]
    others = near.split(".")
    parts = []
    for i, part in enumerate(path.split(".")):
        same = i < len(others) and others[: i + 1] == path.split(".")[: i + 1]
        parts.append(("=" if same else "*") if part.isdigit() else part)
    return ".".join(parts) + rest
