"""Scales of batch normalization: one factor per channel that training learns anyway."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.units import Scores, Units


def batch_norm_scales(units: Units) -> dict[str, nn.Parameter]:
    """Return the scales of the batch normalizations of units, by name."""
    return {
        name: parameter
        for name, parameter in units.parameters().items()
        if name.endswith("weight") and isinstance(units.model.get_submodule(name.rpartition(".")[0]), _BatchNorm)
    }


def mean_scales(units: Units) -> Scores:
    """Return the mean of |scale| over the batch normalizations of each unit; groups that have none are left out."""
    sizes = {name: scale.detach().abs() for name, scale in batch_norm_scales(units).items()}
    if not sizes:
        return {}
    totals = units.sum(sizes)
    counts = units.sum({name: torch.ones_like(size) for name, size in sizes.items()})
    return {group: total / counts[group] for group, total in totals.items() if bool(counts[group].all())}
