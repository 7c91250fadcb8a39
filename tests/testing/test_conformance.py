"""The conformance kit, over the whole registry."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from secateur.methods.magnitude import Magnitude
from secateur.testing import conformance

CASES = [(card.name, granularity) for card in sc.methods() for granularity in card.granularity]


@pytest.mark.parametrize(("name", "granularity"), CASES)
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_every_method_conforms(name, granularity, check):
    check(name, granularity)


@pytest.mark.parametrize(
    ("cheat", "check"),
    [
        (lambda scores, context: {g: 0 * v for g, v in scores.items()}, "scores_fit"),
        (lambda scores, context: (next(context.model.parameters()).data.add_(1), scores)[1], "scoring_leaves_no_trace"),
        (lambda scores, context: (torch.rand(1), scores)[1], "scoring_leaves_no_trace"),
        (lambda scores, context: {g: torch.rand(v.shape) for g, v in scores.items()}, "same_seed_same_scores"),
        (lambda scores, context: (context.gradients(), scores)[1], "data_as_declared"),
        (
            lambda scores, context: {g: v * torch.arange(len(v)) for g, v in scores.items()},
            "relabeling_changes_nothing",
        ),
    ],
)
def test_the_kit_catches_methods_that_cheat(monkeypatch, cheat, check):
    honest = Magnitude.score
    monkeypatch.setattr(Magnitude, "score", lambda self, context: cheat(honest(self, context), context))
    with pytest.raises(AssertionError, match="magnitude"):
        getattr(conformance, check)("magnitude", "channel")
