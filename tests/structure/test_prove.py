"""The search for what is to blame for a cut that could not be proved."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure import prove
from secateur.structure.dims import leaf
from secateur.structure.prove import proved_keep, proved_structure

BAD = {"3.conv[groups]", "5.conv[groups]", "7.conv[groups]"}
CLASSES = [(f"{i}.{kind}",) for i in range(10) for kind in ("conv[groups]", "conv", "norm")]
WIDE, NARROW = torch.float64, torch.float32


def search(monkeypatch, errors_of):
    """Return the culprits among `CLASSES` if cuts have the errors `errors_of(names, dtype)`, and the tries."""
    tries = []

    def errors(model, structure, kept, seed, dtypes=()):
        tries.append((len(kept), dtypes))
        found = {}
        for dtype in dtypes or (NARROW, WIDE):
            found[dtype] = errors_of(set(kept), dtype)
            if found[dtype] <= prove.TOLERANCE[dtype]:
                break
        return prove.Errors(found)

    monkeypatch.setattr(prove, "_cut_errors", errors)
    return prove._each_cut(nn.Identity(), None, list, CLASSES, "wrong", 0).failed, tries


def test_culprits_of_one_kind_are_found_in_a_few_cheap_tries(monkeypatch):
    failed, tries = search(monkeypatch, lambda names, dtype: 0.1 if names & BAD else 1e-12)
    assert set(failed) == BAD and len(failed) == 3
    assert len(tries) <= 20 and tries[-1] == (27, ())  # at last the others, all together
    assert all(dtypes == (NARROW,) for n, dtypes in tries[1:-1] if n > 1)  # groups: no float64


def test_those_that_fail_only_together_are_found_beside_one_that_fails_alone(monkeypatch):
    together = {"2.norm", "9.conv"}
    failed, _ = search(monkeypatch, lambda names, dtype: 0.1 if names & BAD or together <= names else 1e-12)
    assert set(failed) > BAD | together


def test_a_network_that_amplifies_rounding_is_judged_in_float64(monkeypatch):
    failed, tries = search(monkeypatch, lambda names, dtype: 0.4 if dtype == NARROW else 0.01 if names & BAD else 1e-12)
    assert set(failed) == BAD
    assert all(dtypes == () for _, dtypes in tries)
    assert len(tries) < 30


def test_nothing_is_frozen_for_what_float32_alone_says(monkeypatch):
    def errors_of(names, dtype):  # the whole fails alike in both types, parts of it in float32 only
        return 0.1 if names & BAD or (dtype == NARROW and len(names) > 1) else 1e-12

    assert set(search(monkeypatch, errors_of)[0]) == BAD


def test_two_that_fail_only_together_are_both_to_blame(monkeypatch):
    pair = {"0.conv", "9.norm"}
    failed, _ = search(monkeypatch, lambda names, dtype: 0.1 if pair <= names else 1e-12)
    assert pair <= set(failed)


def test_nothing_is_searched_where_everything_can_be_cut(monkeypatch):
    assert search(monkeypatch, lambda names, dtype: 1e-12) == ({}, [(len(CLASSES), ())])


class Switched(nn.Module):
    """Its code takes another path when `a` is small."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x)
        y = self.b(y.relu() if y.shape[1] > 6 else y.sigmoid())
        return self.c(y.tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_axis_that_changes_the_path_is_frozen(dtype):
    model = Switched().eval().to(dtype)
    x = torch.randn(2, 4, dtype=dtype)
    structure = proved_structure(model, x)
    assert [axis.name for axis in structure.prunable] == ["b"]
    free = sc.trace(model, x)
    proof, left = proved_keep(model, free, {"a": torch.arange(8) < 7, "b": torch.arange(6) < 3})
    assert proof.ok and left is free  # seven are enough for the same path
    proof, left = proved_keep(model, free, {"a": torch.arange(8) < 4, "b": torch.arange(6) < 3})
    assert not proof.ok and [axis.name for axis in left.prunable] == ["b"]


def test_a_model_that_draws_random_numbers_is_compared_on_equal_draws():
    class Masking(nn.Module):
        """Hides random positions in eval mode too, as masked autoencoders do."""

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            seen = torch.rand(x.shape[1]).argsort()[: x.shape[1] // 2]
            return self.second(torch.relu(self.first(x[:, seen])))

    structure = proved_structure(Masking().eval(), torch.randn(2, 8, 6))
    assert structure.axis("first").prunable


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_that_is_cut_wrongly_is_not_run(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = kind(8, 16, num_layers=2, bidirectional=True), nn.Linear(32, 3)

        def forward(self, x):
            return self.head(self.layer(x)[0])

    model = Recurrent().eval()
    structure = sc.trace(model, torch.randn(5, 2, 8))
    kept = {axis.name: torch.arange(axis.size) < 5 for axis in structure.prunable}
    assert prove.prove_cut(model, structure, kept).ok
    for name, position in (("layer.weight_hh_l0", 1), ("layer.weight_ih_l1", 1), ("layer.bias_hh_l1_reverse", 0)):
        dims = list(structure.tensors[name])
        dims[position] = leaf(dims[position].size)  # stays whole; run, some of these would end the process
        wrong = dataclasses.replace(structure, tensors={**structure.tensors, name: tuple(dims)})
        assert prove._cut_errors(model, wrong, kept, 0) == prove.Errors({torch.float32: float("inf")})
