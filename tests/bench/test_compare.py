from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.bench.compare import Candidate, Comparison, compare
from secateur.errors import DataNeeded, InvalidRecipe, UnknownName


def made_up(values, dense=0.99):
    """A comparison with these figures by method; None for a method that failed."""
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    pruned = sc.prune(net, torch.zeros(1, 8), budget=sc.Budget(macs=0.5), granularity="channel")
    candidates = tuple(
        Candidate(name, dict(enumerate(v)), pruned, None) if v else Candidate(name, {}, None, None, "it cannot")
        for name, v in values.items()
    )
    return Comparison(sc.Budget(macs=0.5), dense, candidates)


def test_a_winner_is_recommended_with_its_distance_from_random():
    found = made_up({"taylor": [0.95, 0.96, 0.95], "magnitude": [0.94, 0.96, 0.95], "random": [0.90, 0.91, 0.90]})
    words = found.recommendation
    assert words.startswith("taylor: 95.33 ± 1.43 %, the dense network has 99.00 %.")
    assert "5.00 points above random pruning (5.00 to 5.00)." in words
    assert "Not told apart from it over 3 seeds: magnitude." in words


def test_no_winner_is_invented():
    near = made_up({"taylor": [0.95, 0.90, 0.97], "random": [0.94, 0.91, 0.96]})
    assert "No method is decidedly better than random pruning" in near.recommendation
    best = made_up({"random": [0.95, 0.96, 0.95], "taylor": [0.90, 0.91, 0.90]})
    assert "No method is decidedly better" in best.recommendation
    assert "One seed decides nothing" in made_up({"taylor": [0.95], "random": [0.1]}).recommendation


def test_the_table_ranks_with_ties_and_shows_failures():
    found = made_up({"taylor": [0.95, 0.96, 0.95], "random": [0.90, 0.91, 0.90], "other": None})
    rows = found.table().rows
    assert [row[0] for row in rows] == ["1", "2", ""] and rows[2][2] == "failed: it cannot"
    assert rows[0][3].startswith("+5.00 ± 0.00") and rows[1][3] == ""
    assert "taylor" in found.report() and "it cannot" in found.report()
    with pytest.raises(InvalidRecipe, match="No method met the budget .* other: it cannot"):
        _ = made_up({"other": None}).best


@pytest.fixture(scope="module")
def problem():
    """A trained network of which half of the units do nothing: magnitude finds them, random does not."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 8)
    targets = (inputs @ torch.randn(8, 4)).argmax(1)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs[:300]), targets[:300]).backward()
        optimizer.step()
    with torch.no_grad():
        bigger = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        for parameter in bigger.parameters():
            parameter.mul_(1e-3)
        bigger[0].weight[:32], bigger[0].bias[:32] = net[0].weight, net[0].bias
        bigger[2].weight[:, :32], bigger[2].bias[:] = net[2].weight, net[2].bias
    return bigger, [(inputs[:300], targets[:300])], [(inputs[300:], targets[300:])]


def test_methods_are_compared_on_a_real_network(problem, tmp_path):
    model, train, held_out = problem
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = []
    found = compare(
        model,
        torch.zeros(1, 8),
        budget=sc.Budget(macs=0.5),
        data=train,
        validation=held_out,
        methods=["magnitude"],
        granularity="channel",
        on_run=lambda method, seed: seen.append((method, seed)),
    )
    assert seen == [(m, s) for m in ("magnitude", "random") for s in (0, 1, 2)]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    best = found.best
    assert best.method == "magnitude" and best.value.mean == pytest.approx(found.dense, abs=0.011)
    assert found.against("magnitude", "random").verdict == "better"
    assert best.pruned.model[0].out_features == 32 and best.latency.pruned.n >= 20
    content = json.loads(json.dumps(found.as_dict()))
    assert [m["method"] for m in content["methods"]] == ["magnitude", "random"] and content["dense"] == found.dense
    found.report(tmp_path / "r.html")
    assert "Accuracy against cost" in (tmp_path / "r.html").read_text()


def test_a_metric_of_the_users_own_and_default_methods(problem):
    model, _, _ = problem
    found = compare(
        model, torch.zeros(1, 8), budget=sc.Budget(sparsity=0.5),
        metric=lambda net: float(net[0].weight.detach().abs().sum()),
        seeds=[0],
    )  # fmt: skip
    names = {c.method for c in found.candidates}
    assert {"random", "magnitude", "taylor"} <= names and found.best.method == "magnitude"
    assert {sc.method(name).card.paradigm for name in names} == {"baseline", "after training"}
    assert any(c.method == "taylor" and "data" in c.error for c in found.candidates)  # none were given


def test_what_cannot_be_compared_is_refused_at_once(problem):
    model, train, held_out = problem
    with pytest.raises(DataNeeded, match="validation="):
        compare(model, torch.zeros(1, 8), budget=sc.Budget(macs=0.5), data=train)
    with pytest.raises(UnknownName, match="Did you mean 'taylor'"):
        compare(model, torch.zeros(1, 8), budget=sc.Budget(macs=0.5), validation=held_out, methods=["tailor"])
