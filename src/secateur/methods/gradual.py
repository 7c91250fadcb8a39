"""Gradual magnitude pruning: the smallest weights leave while the network trains, fast at first, slower at the end.

Zhu and Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression, arXiv 1710.01878,
equation 1. A recipe of parts that exist: magnitude and the cubic schedule.
"""

from __future__ import annotations

from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import Cubic
from secateur.core.slots import Criterion

METHOD = Method("gradual", Recipe(criterion=Criterion.parse("magnitude"), schedule=Cubic()))
