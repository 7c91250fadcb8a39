"""Random cuts, and what they touch."""

from __future__ import annotations

from random import Random

import torch

import secateur as sc
from secateur.structure.dims import unit_index
from secateur.structure.structure import Kept

# A zero is not absent for these: the independent oracle, which zeroes, does not judge cuts that they run over.
STATISTICS = {
    "native_layer_norm",
    "_fused_rms_norm",
    "native_group_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "mean",
    "prod",
    "amax",
    "amin",
    "logsumexp",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "any",
    "all",
    "_softmax",
    "_log_softmax",
    "_safe_softmax",
}


def random_cut(structure: sc.Structure, r: Random, share: float = 0.7, fewest: int = 1) -> dict[str, torch.Tensor]:
    """Random units of a random share of the axes; tied axes lose units together, in their steps.

    At least `fewest` steps of units stay: some code breaks on a single one (``squeeze``, a variance).
    """
    tied = {name for tie in structure.ties for name in tie}
    classes = [*structure.ties, *((axis.name,) for axis in structure.prunable if axis.name not in tied)]
    kept = {}
    for names in classes:
        if r.random() > share:
            continue
        steps = {name: structure.steps.get(name, 1) for name in names}
        most = min(structure.axis(name).size // step for name, step in steps.items()) - fewest
        losses = r.randint(1, most) if most > 1 else most
        for name, step in steps.items():
            size = structure.axis(name).size
            kept[name] = torch.zeros(size, dtype=torch.bool)
            kept[name][r.sample(range(size), size - step * losses)] = True
    return kept


def runs_a_statistic(structure: sc.Structure, kept: Kept) -> bool:
    """Whether a statistic is taken over a cut axis."""
    if any(name == "_weight_norm_interface" for name, _ in structure.path):
        return True  # the norm of a kernel of zeros divides by zero
    cut = [structure.axis(name).leaf for name, mask in kept.items() if not bool(mask.all())]
    sites = [site for name, sites in structure.path if name in STATISTICS for site in sites]
    return any(bool((unit_index(site.dim, node) >= 0).any()) for site in sites for node in cut)
