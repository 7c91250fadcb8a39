"""Redundant features: of filters that point in the same direction one stays.

Ayinde & Zurada: Building Efficient ConvNets using Redundant Feature Pruning, ICLR workshop 2018 (arXiv 1802.07653);
Ayinde, Inanc & Zurada, Neural Networks 2019. Linkage as in the reference code: complete. Deviations: see the card.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from torch import Tensor, nn

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.slots import Criterion, Scope
from secateur.core.units import Scores
from secateur.parts.filters import filters
from secateur.parts.granularity.channel import Channel
from secateur.parts.readers import channel_units

LARGEST_DISTANCE = 2.0
"""1 - cos of opposite filters."""


class Redundant(Criterion):
    """The cosine distance at which agglomerative clustering makes a unit superfluous (complete linkage).

    Clustering joins the two nearest clusters again and again, and of their two representatives one leaves; the distance
    of the clusters is its score. A cut anywhere in this order leaves one representative of each cluster.

    Attributes:
        representative: Which of two stays: the one of larger ``norm``, or ``random``.
    """

    name = "redundant"
    representative: Literal["norm", "random"] = "norm"

    def score(self, context: Context) -> Scores:
        """Return distances in [0, 2]; filters that are zero have -1, and the last one of each axis has 2."""
        units = channel_units(context.units, "Redundant feature pruning")
        return {
            axis.name: self._leaving(context, filters(units, axis, context.weights))
            for axis in units.structure.prunable
        }

    def _leaving(self, context: Context, vectors: Tensor) -> Tensor:
        norms = vectors.norm(dim=1).cpu()
        alive = (norms > 0).nonzero().flatten()
        scores = torch.full_like(norms, -1.0)
        scores[alive] = LARGEST_DISTANCE
        rank = norms if self.representative == "norm" else torch.rand(norms.shape, generator=context.generator)
        here = alive.tolist()  # the representative of each cluster, in the order in which scipy numbers clusters
        for first, second, distance in agglomeration(vectors[alive].cpu()):
            stays, leaves = sorted((here[first], here[second]), key=lambda unit: -float(rank[unit]))
            scores[leaves] = distance
            here.append(stays)
        return scores


def agglomeration(vectors: Tensor) -> list[tuple[int, int, float]]:
    """Return which clusters are joined in which order, and their distance, the largest 1 - cos between their members.

    Args:
        vectors: Nonzero, of shape (n, size). Each is a cluster at first, numbered by its row; the i-th join makes the
            cluster n + i.

    Returns:
        n - 1 joins, at distances that never fall.
    """
    if len(vectors) < 2:
        return []
    directions = torch.nn.functional.normalize(vectors, dim=1)
    distances = (1 - directions @ directions.T).clamp(0, LARGEST_DISTANCE).fill_diagonal_(0)
    joins = linkage(squareform(distances.numpy(), checks=False), "complete")
    return [(int(first), int(second), float(distance)) for first, second, distance, _ in joins]


def sparsity_at(scores: Scores, threshold: float) -> float:
    """Return the share of units that clustering at a similarity threshold removes: the sparsity to ask a budget for.

    Args:
        scores: Of `Redundant`.
        threshold: Filters whose cosine is at least this much may share a cluster.
    """
    removed = sum(int((s <= 1 - threshold).sum()) for s in scores.values())
    return removed / sum(s.numel() for s in scores.values())


def sparsity_for(model: nn.Module, example_inputs: Any, threshold: float, scope: Scope | None = None) -> float:
    """Return the sparsity to ask a budget for where the paper names a similarity threshold.

    Args:
        model: Before it is pruned.
        example_inputs: As for `secateur.prune`.
        threshold: Filters whose cosine is at least this much may share a cluster.
        scope: Which axes may be pruned; default: all.
    """
    units = Channel().units(model, example_inputs, scope or Scope())
    return sparsity_at(Redundant().score(Context(units)), threshold)


METHOD = Method("redundant", Recipe(criterion=Redundant(), granularity="channel"))
