from __future__ import annotations

import torch

from secateur.parts.allocation.ranking import Global, Uniform


def test_global_without_normalization_is_the_identity():
    scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([[2.0]])}
    ranked = Global().rank(scores)
    assert all(torch.equal(ranked[g], scores[g]) for g in scores)


def test_global_divides_by_the_scale_of_the_group():
    scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([10.0, 30.0]), "zero": torch.zeros(2)}
    assert Global(normalize="mean").rank(scores)["a"].tolist() == [1.5, 0.5]
    assert Global(normalize="mean").rank(scores)["b"].tolist() == [0.5, 1.5]
    assert Global(normalize="max").rank(scores)["b"].tolist() == [10 / 30, 1.0] or torch.allclose(
        Global(normalize="max").rank(scores)["b"], torch.tensor([1 / 3, 1.0])
    )
    assert Global(normalize="mean").rank(scores)["zero"].tolist() == [0, 0]


def test_infinite_scores_stay_infinite_and_do_not_spoil_the_scale():
    ranked = Global(normalize="mean").rank({"a": torch.tensor([float("inf"), 3.0, 1.0])})
    assert ranked["a"].tolist() == [float("inf"), 1.5, 0.5]


def test_uniform_gives_relative_ranks_and_breaks_ties_by_index():
    ranked = Uniform().rank({"a": torch.tensor([5.0, 1.0, 5.0, 9.0]), "b": torch.tensor([[2.0, 1.0]])})
    assert ranked["a"].tolist() == [0.625, 0.125, 0.375, 0.875]
    assert ranked["b"].tolist() == [[0.75, 0.25]]
