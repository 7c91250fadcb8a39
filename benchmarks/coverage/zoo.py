"""The networks: names, constructors, example inputs. Weights are random; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.hugging_face import TYPES, build_type
from benchmarks.coverage.table import PEERS
from secateur.structure.inputs import as_inputs, call_with_state, undisturbed
from secateur.tasks.zoo import allow_torchvision

TIMM: dict[str, str] = json.loads((Path(__file__).parent / "timm.json").read_text(encoding="utf-8"))
"""Module family -> its smallest network, cheapest first."""

SMALL = 128
"""Side of the images for networks that take any size, to save time."""
SIZES = {"timm:halonet_h1": 256, "timm:deepseek_vit_412m": 140, "torchvision:inception_v3": 299}
FIXED_TORCHVISION = ("vit", "maxvit")


def names() -> list[str]:
    """Return the names of all networks, ``library:network``, cheapest first within each library."""
    everything = [
        *(f"hf:{model_type}" for model_type in TYPES),
        *PEERS,
        *(f"torchvision:{network}" for network in torchvision_networks()),
        *(f"timm:{network}" for network in TIMM.values()),
    ]
    return list(dict.fromkeys(everything))


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a network with random weights in eval mode, and example inputs for it.

    It has run once: the first call of some fills caches of their library, and later calls take another path.
    """
    library, _, network = name.partition(":")
    allow_torchvision()
    torch.manual_seed(0)
    model, inputs = _BUILDERS[library](network)
    with undisturbed(model.eval()):
        call_with_state(model, {}, as_inputs(inputs))
    return model, inputs


def _timm(network: str) -> tuple[nn.Module, Any]:
    import timm

    model = timm.create_model(network)
    channels, *sides = model.pretrained_cfg["input_size"]
    if not model.pretrained_cfg.get("fixed_input_size"):
        sides = [SIZES.get(f"timm:{network}", SMALL)] * 2
    return model, torch.randn(2, channels, *sides)


def torchvision_networks() -> list[str]:
    """Return torchvision's classification and segmentation networks."""
    allow_torchvision()
    from torchvision import models

    return [*models.list_models(module=models), *models.list_models(module=models.segmentation)]


def _torchvision(network: str) -> tuple[nn.Module, Any]:
    from torchvision import models

    options = {"weights_backbone": None} if network in models.list_models(module=models.segmentation) else {}
    if network in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    size = SIZES.get(f"torchvision:{network}", 224 if network.startswith(FIXED_TORCHVISION) else SMALL)
    return models.get_model(network, weights=None, **options), torch.randn(2, 3, size, size)


_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": build_type,
}
