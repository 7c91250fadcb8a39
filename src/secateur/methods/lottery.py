"""Lottery tickets: iterative magnitude pruning, with what is left set back to where it began after each round.

Frankle, Carbin: The Lottery Ticket Hypothesis, ICLR 2019; rewinding to a step: Frankle et al.: Linear Mode Connectivity
and the Lottery Ticket Hypothesis, ICML 2020; Renda, Frankle, Carbin: Comparing Rewinding and Fine-tuning, ICLR 2020.
"""

from __future__ import annotations

from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import Iterative

METHOD = Method("lottery", Recipe(criterion="magnitude", weights_from="init", schedule=Iterative(steps=10, whole=True)))
