from __future__ import annotations

import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch import nn

import secateur as sc
from secateur.core.context import Context
from secateur.core.select import top_k
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.methods.redundant import Redundant, agglomeration, sparsity_at, sparsity_for
from secateur.parts.filters import filters
from secateur.parts.granularity.channel import Channel
from secateur.testing.toys import toy


def scored(model, x, **settings):
    units = Channel().units(model, x, Scope())
    return units, Redundant(**settings).score(Context(units))


def pair(filters, outputs=3):
    """Linear, ReLU, linear without biases, with the given filters in float64."""
    model = nn.Sequential(
        nn.Linear(filters.shape[1], len(filters), bias=False), nn.ReLU(), nn.Linear(len(filters), outputs)
    )
    model = model.double()
    with torch.no_grad():
        model[0].weight.copy_(filters)
    return model


def planted():
    """40 filters: 30 distinct ones, of which the last 5 are opposites of others, and 10 positive multiples."""
    torch.manual_seed(0)
    distinct = torch.randn(25, 60, dtype=torch.float64)
    factors = torch.rand(10, 1, dtype=torch.float64) + 0.5
    return torch.cat([distinct, -distinct[:5], distinct[:10] * factors])


def test_planted_multiples_leave_first_and_negated_copies_stay():
    model = pair(planted())
    _, scores = scored(model, torch.randn(2, 60, dtype=torch.float64))
    zero = scores["0"] < 1e-12
    assert int(zero.sum()) == 10 and sparsity_at(scores, 0.999) == 10 / 40
    assert not zero[25:30].any() and not zero[10:25].any()
    norms = model[0].weight.norm(dim=1)
    assert all(
        zero[i] != zero[30 + i] and norms[i if zero[30 + i] else 30 + i] == norms[[i, 30 + i]].max() for i in range(10)
    )


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2, 0.4])
def test_units_that_stay_at_a_threshold_represent_the_clusters_of_complete_linkage(threshold):
    torch.manual_seed(1)
    vectors = torch.randn(30, 8, dtype=torch.float64)
    _, scores = scored(pair(vectors), torch.randn(2, 8, dtype=torch.float64))
    labels = fcluster(linkage(vectors.numpy(), "complete", "cosine"), 1 - threshold, "distance")
    stay = scores["0"] > 1 - threshold
    assert sorted(labels[stay.numpy()]) == sorted(set(labels))
    assert int(stay.sum()) == round((1 - sparsity_at(scores, threshold)) * 30)
    cosines = torch.nn.functional.normalize(vectors, dim=1) @ torch.nn.functional.normalize(vectors, dim=1).T
    same = torch.tensor(labels)[:, None] == torch.tensor(labels)[None, :]
    assert cosines[same].min() >= threshold


def test_the_number_that_stays_falls_with_the_threshold():
    torch.manual_seed(2)
    _, scores = scored(pair(torch.randn(30, 5, dtype=torch.float64)), torch.randn(2, 5, dtype=torch.float64))
    shares = [sparsity_at(scores, threshold / 20) for threshold in range(20, -1, -1)]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 0.5


def test_distances_are_hand_computed():
    """Angles 0, 10, 40 degrees: 0 and 10 join first; that cluster and 40 at the distance of 0 and 40."""
    angles = torch.tensor([0.0, 10.0, 40.0], dtype=torch.float64).deg2rad()
    vectors = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    _, scores = scored(pair(vectors), torch.randn(2, 2, dtype=torch.float64))
    expected = torch.stack([1 - angles[1].cos(), 1 - angles[2].cos(), torch.tensor(2.0, dtype=torch.float64)])
    torch.testing.assert_close(scores["0"], expected)
    assert agglomeration(vectors[:1]) == []


def test_zero_filters_leave_before_all_others_and_the_last_one_of_an_axis_is_never_nan():
    vectors = planted()
    vectors[[3, 7]] = 0
    _, scores = scored(pair(vectors), torch.randn(2, 60, dtype=torch.float64))
    assert (scores["0"][[3, 7]] == -1).all() and (scores["0"] == -1).sum() == 2
    _, scores = scored(pair(torch.zeros(3, 4, dtype=torch.float64)), torch.randn(2, 4, dtype=torch.float64))
    assert (scores["0"] == -1).all()


def test_a_random_representative_follows_the_seed():
    model, x = pair(planted()), torch.randn(2, 60, dtype=torch.float64)
    units = Channel().units(model, x, Scope())
    first, same, other = (Redundant(representative="random").score(Context(units, seed=s))["0"] for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert (first < 1e-12).sum() == (other < 1e-12).sum() == 10


def test_a_stream_is_clustered_on_the_rows_of_all_that_write_it():
    model, x = toy("resnet20")
    units = Channel().units(model, x, Scope())
    axis = next(a for a in units.structure.prunable if a.name == "conv1")
    weights = dict(model.named_parameters())
    expected = torch.cat(
        [weights[n].flatten(1) for n in ("conv1.weight", *(f"blocks.{i}.conv2.weight" for i in range(3)))], 1
    )
    found = filters(units, axis, weights)
    assert torch.equal(found, expected.double())


def test_heads_are_vectors_of_all_their_rows():
    model, x = toy("vit")
    units = Channel().units(model, x, Scope())
    axis = next(a for a in units.structure.prunable if a.name == "blocks.0.attention.qkv[heads]")
    found = filters(units, axis, dict(model.named_parameters()))
    rows = model.blocks[0].attention.qkv.weight.view(3, 3, 8, 24)  # q k v, heads, head_dim, inputs
    assert torch.equal(found, rows.transpose(0, 1).reshape(3, -1).double())


def test_a_table_that_is_added_is_no_filter():
    class WithPositions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("positions", torch.randn(1, 5, 8))

        def forward(self, x):
            return self.second(torch.tanh(self.first(x) + self.positions))

    model = WithPositions()
    units, scores = scored(model, torch.randn(2, 5, 4))
    (axis,) = units.structure.prunable
    assert ("positions", 2) in axis.members and scores["first"].shape == (8,)
    assert torch.equal(filters(units, axis, dict(model.named_parameters())), model.first.weight.double())


# ----------------------------------------------------------------------------------------------- exact merging


def doubled(first, last):
    """The second half of the filters becomes positive multiples of the first half, biases included."""
    half = first.weight.shape[0] // 2
    with torch.no_grad():
        factors = torch.rand(half) + 0.5
        first.weight[half:] = first.weight[:half] * factors.view([-1] + [1] * (first.weight.dim() - 1))
        first.bias[half:] = first.bias[:half] * factors
        last.weight.normal_()
    return factors


def dense(kind):
    torch.manual_seed(0)
    if kind == "linear":
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
        doubled(model[0], model[2])
        return model, torch.randn(4, 8)
    first, norm, last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
    factors = doubled(first, last)
    if kind == "convolution":
        return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), last, nn.Flatten()).eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():  # normalization cancels the factors, and brings others
        norm.running_mean[:4] = torch.randn(4)
        norm.running_mean[4:] = norm.running_mean[:4] * factors
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
        norm.bias[:4] = torch.randn(4)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias[4:] = norm.bias[:4] * factors * scale[4:] / scale[:4]
    flat = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 5)]
    tail = flat if kind == "normalized, flattened" else [last, nn.Flatten()]
    return nn.Sequential(first, norm, nn.ReLU(), *tail).eval(), torch.randn(4, 3, 8, 8)


@pytest.mark.parametrize("kind", ["linear", "convolution", "normalized", "normalized, flattened"])
def test_planted_duplicates_are_merged_exactly(kind):
    model, x = dense(kind)
    budget = sc.Budget(sparsity=0.5)
    merged = sc.prune(model, x, method="redundant", budget=budget, scope=Scope(include=("0",)), repair="merge")
    assert merged.model[0].weight.shape[0] == model[0].weight.shape[0] // 2
    torch.testing.assert_close(merged.model(x), model(x), rtol=1e-5, atol=1e-5)
    dropped = sc.prune(model, x, method="redundant", budget=budget, scope=Scope(include=("0",)))
    assert (dropped.model(x) - model(x)).abs().max() > 0.1


def test_filters_that_are_not_alike_are_dropped():
    torch.manual_seed(0)
    model, x = pair(torch.randn(6, 9, dtype=torch.float64)), torch.randn(2, 9, dtype=torch.float64)
    options = {"method": "redundant", "budget": sc.Budget(sparsity=0.5)}
    dropped, merged = sc.prune(model, x, **options), sc.prune(model, x, **options, repair="merge")
    assert torch.equal(dropped.model[2].weight, merged.model[2].weight)


def test_what_several_layers_write_is_dropped_without_merging():
    model, x = toy("resnet20")
    options = {"method": "redundant", "budget": sc.Budget(sparsity=0.5), "scope": Scope(include=("conv1",))}
    merged = sc.prune(model, x, **options, repair={"name": "merge", "similarity": 0.001}).model
    assert torch.equal(merged.fc.weight, sc.prune(model, x, **options).model.fc.weight)


def test_a_budget_picks_the_same_units_as_the_threshold_that_it_follows_from():
    model, x = toy("resnet20")
    _, scores = scored(model, x)
    sparsity = sparsity_at(scores, 0.3)
    total = sum(s.numel() for s in scores.values())
    kept = top_k(scores, round((1 - sparsity) * total))
    assert 0 < sparsity < 1 and all(torch.equal(kept[g], s > 0.7) for g, s in scores.items())


def test_a_threshold_keeps_one_filter_for_each_direction():
    """All axes of the network, by the budget that a threshold stands for."""
    directions = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
    with torch.no_grad():
        model[0].weight.copy_(directions.repeat(3, 1) + 0.01 * torch.randn(9, 3))
    sparsity = sparsity_for(model, torch.randn(1, 3), threshold=0.9)
    assert sparsity == pytest.approx(6 / 9)
    pruned = sc.prune(model, torch.randn(1, 3), method="redundant", budget=sc.Budget(sparsity=sparsity))
    assert pruned.model[0].weight.argmax(1).sort().values.tolist() == [0, 1, 2]


def test_single_weights_have_no_direction():
    model, x = toy("mlp")
    with pytest.raises(NotApplicable, match="works on channels"):
        sc.prune(model, x, method="redundant", granularity="weight", budget=sc.Budget(sparsity=0.5))
