"""A pruned model as one file that cannot run code: tensors plus a plan as JSON.

Loading builds the original network with the user's own constructor, cuts it by the plan, and puts the tensors in. A
digest over all of it is checked first, so a damaged file is refused and never loads partly.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.atomic import written_atomically
from secateur.deploy import Artifact
from secateur.errors import InvalidFile, PlanMismatch
from secateur.structure.inputs import aliases_of, state_of
from secateur.structure.plan import Plan, parse_plan
from secateur.structure.surgery import apply_plan, replace_tensors, share_memory

FORMAT = 1
_MASK = "mask:"


def write(
    path: str | os.PathLike[str],
    model: nn.Module,
    plan: Plan | None = None,
    masks: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write a model, the plan that made it from the original, its masks, and facts about it (plain data).

    Raises:
        InvalidFile: The folder does not exist, or the disk is full.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_of(model).items()}
    tensors |= {name: tensors[name].clone() for aliases in aliases_of(model) for name in aliases}
    tensors |= {f"{_MASK}{name}": _pack(mask) for name, mask in (masks or {}).items()}
    header = {"format": FORMAT, "plan": (plan or Plan()).model_dump(mode="json"), "about": dict(about or {})}
    text = json.dumps(header, sort_keys=True)
    with written_atomically(path) as temporary:
        try:
            save_file(tensors, temporary, {"secateur": text, "sha256": _digest(tensors, text)})
        except SafetensorError as error:
            raise InvalidFile(f"Cannot write {os.fspath(path)!r}: {error}.") from error
    return Artifact(Path(path), "safetensors", Path(path).stat().st_size)


def read(path: str | os.PathLike[str], build: Callable[[], nn.Module]) -> nn.Module:
    """Return the model of a file, in eval mode.

    Args:
        path: A file that `write` made.
        build: Makes the original, unpruned network; its weights do not matter.

    Raises:
        InvalidFile: The file is missing, damaged, or not one of ours.
        PlanMismatch: `build` makes another network than the one that was pruned.
    """
    tensors, header = _read_checked(path)
    plan = parse_plan(header["plan"])
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_MASK)}
    model = _built(build)
    apply_plan(model, plan)
    _put(model, tensors)
    return model.eval()


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Return what the model of a file keeps of the original network."""
    return parse_plan(_read_checked(path)[1]["plan"])


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the facts that were stored with a model."""
    about: dict[str, Any] = _read_checked(path)[1]["about"]
    return about


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the masks that were stored with a model, by parameter name; empty if it has none."""
    tensors, _ = _read_checked(path)
    masks = {name.removeprefix(_MASK): packed for name, packed in tensors.items() if name.startswith(_MASK)}
    return {name: _unpack(packed, tensors[name].shape) for name, packed in masks.items()}


def _read_checked(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not Path(path).is_file():
        raise InvalidFile(f"There is no file {os.fspath(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidFile(f"{os.fspath(path)!r} is damaged or not a safetensors file: {error}.") from error
    if "secateur" not in metadata:
        raise InvalidFile(f"{os.fspath(path)!r} was not written by secateur: it holds no plan.")
    if metadata.get("sha256") != _digest(tensors, metadata["secateur"]):
        raise InvalidFile(f"{os.fspath(path)!r} is damaged: its content does not match its digest. Get a new copy.")
    header = json.loads(metadata["secateur"])
    if header["format"] != FORMAT:
        raise InvalidFile(
            f"{os.fspath(path)!r} has format {header['format']}; this version reads {FORMAT}. Upgrade it."
        )
    return tensors, header


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    """Build without memory where the constructor allows it."""
    try:
        with torch.device("meta"):
            model = build()
    except Exception:  # some constructors compute with their tensors, which only works on a real device
        return build()
    plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return build() if any(value.is_meta for value in plain) else model


def _put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace every parameter and buffer by the stored one; shared tensors stay shared."""
    state = state_of(model)
    if state.keys() != tensors.keys():
        missing, extra = sorted(state.keys() - tensors.keys())[:3], sorted(tensors.keys() - state.keys())[:3]
        raise PlanMismatch(
            f"The file does not fit the model that was built. Missing in the file: {missing}; unknown to the model: "
            f"{extra}. Pass the constructor of the network that was pruned, with the same settings."
        )
    replaced: dict[int, Tensor] = {}
    for name, old in state.items():
        # A buffer may have another size once the network has run: tables that are made for the size of the inputs.
        if old.shape != tensors[name].shape and (isinstance(old, nn.Parameter) or old.dim() != tensors[name].dim()):
            raise PlanMismatch(
                f"The file does not fit the model that was built: {name!r} has shape {tuple(tensors[name].shape)} "
                f"in the file and {tuple(old.shape)} in the model. Pass the constructor of the network that was pruned."
            )
        # In memory of its own: the file may change, and kernels round otherwise where tensors begin at odd addresses.
        new = tensors[name].clone()
        replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    whole, _ = aliases_of(model)
    replace_tensors(model, replaced)
    share_memory(model, whole)


def _pack(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    flat = np.unpackbits(packed.numpy(), count=shape.numel())
    return torch.from_numpy(flat.astype(bool)).view(shape)


def _digest(tensors: Mapping[str, Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
