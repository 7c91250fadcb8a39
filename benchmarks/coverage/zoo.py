"""The networks: names, constructors, example inputs. Weights are random; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.coverage.hugging_face import TYPES, build_type
from secateur.tasks.zoo import allow_torchvision

TIMM = json.loads((Path(__file__).parent / "timm.json").read_text(encoding="utf-8"))
"""Module family -> (its smallest network, input shape), cheapest first."""

TORCHVISION_SIZES = {"inception_v3": 299}
SMALL_TORCHVISION_INPUT = 128


def names() -> list[str]:
    """Return the names of all networks, ``library:network``."""
    return [
        *(f"timm:{network}" for network, _ in TIMM.values()),
        *(f"torchvision:{network}" for network in torchvision_networks()),
        *(f"hf:{model_type}" for model_type in TYPES),
    ]


def build(name: str) -> tuple[nn.Module, Any]:
    """Return a network with random weights in eval mode, and example inputs for it."""
    library, _, network = name.partition(":")
    allow_torchvision()
    torch.manual_seed(0)
    model, inputs = _BUILDERS[library](network)
    return model.eval(), inputs


def _timm(network: str) -> tuple[nn.Module, Any]:
    import timm

    shape = next(shape for name, shape in TIMM.values() if name == network)
    return timm.create_model(network), torch.randn(2, *shape)


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
    size = TORCHVISION_SIZES.get(network, 224 if network.startswith(("vit", "maxvit")) else SMALL_TORCHVISION_INPUT)
    return models.get_model(network, weights=None, **options), torch.randn(2, 3, size, size)


_BUILDERS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": build_type,
}
