from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.bench.compare import Candidate, Comparison, compare
from secateur.errors import DataNeeded, InvalidRecipe, UnknownName
from secateur.measure.report import MINUS


def made_up(values, dense=0.99, share=True):
    """A comparison with these figures by method; None for a method that failed."""
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    pruned = sc.prune(net, torch.zeros(1, 8), budget=sc.Budget(macs=0.5), granularity="channel")
    candidates = tuple(
        Candidate(name, dict(enumerate(v)), pruned, None) if v else Candidate(name, {}, None, None, "it cannot")
        for name, v in values.items()
    )
    return Comparison(sc.Budget(macs=0.5), dense, candidates, share)


def test_a_winner_is_recommended_with_its_distance_from_random():
    found = made_up({"taylor": [0.95, 0.96, 0.95], "magnitude": [0.94, 0.96, 0.95], "random": [0.90, 0.91, 0.90]})
    words = found.recommendation
    assert words.startswith("taylor: 95.33 ± 1.43 %, the dense network has 99.00 %.")
    assert "5.00 points above random pruning (5.00 to 5.00)." in words
    assert "Not told apart from it over 3 seeds: magnitude." in words


def test_no_winner_is_invented():
    near = made_up({"taylor": [0.95, 0.90, 0.97], "random": [0.94, 0.91, 0.96]})
    assert near.recommendation.endswith(
        "No method is decidedly better than random pruning here; the choice hardly matters."
    )
    assert "One seed decides nothing" in made_up({"taylor": [0.95], "random": [0.1]}).recommendation
    assert made_up({"taylor": [0.95, 0.9], "random": None}).recommendation.endswith("No other method has a result.")


def test_where_random_pruning_wins_the_losers_are_named():
    sure, unsure, lost = [0.95, 0.96, 0.95], [0.90, 0.96, 0.94], [0.90, 0.91, 0.90]
    words = made_up({"random": sure, "sfp": unsure, "taylor": lost}).recommendation
    assert "No method is decidedly better than random pruning here; decidedly worse: taylor. Take random, or" in words
    assert words.endswith("Not told apart from it over 3 seeds: sfp.") and "hardly" not in words
    words = made_up({"sfp": sure, "random": unsure, "taylor": lost}).recommendation  # taylor is worse than sfp alone
    assert "No method is decidedly better than random pruning here. Take sfp, or" in words and "worse" not in words
    steady = made_up({"sfp": [0.95, 0.99, 0.91], "taylor": [0.949, 0.969, 0.889], "random": [0.94, 0.96, 0.88]})
    words = steady.recommendation
    assert "sfp is not decidedly better than random pruning here; decidedly better: taylor. Take taylor, or" in words


def test_a_metric_that_is_no_share_is_shown_as_it_is():
    losses = {"taylor": [-5.0, -5.5, -5.25], "random": [-6.0, -6.5, -6.25], "other": None}
    found = made_up(losses, dense=-4.0, share=False)
    assert found.recommendation == (
        f"taylor: {MINUS}5.25 ± 0.62103, the dense network has {MINUS}4. 1 above random pruning (1 to 1)."
    )
    table = found.table()
    assert table.head[2:4] == ["metric", "above random"] and "%" not in str(table.rows)
    assert table.rows[0][2:4] == [f"{MINUS}5.25 ± 0.62103", "+1 ± 0"]
    page = found.report()
    assert "accuracy (%)" not in page and "Metric against cost" in page


def test_the_table_ranks_with_ties_and_shows_failures():
    found = made_up({"taylor": [0.95, 0.96, 0.95], "random": [0.90, 0.91, 0.90], "other": None})
    rows = found.table().rows
    assert [row[0] for row in rows] == ["1", "2", ""] and rows[2][2] == "failed: it cannot"
    assert rows[0][3].startswith("+5.00 ± 0.00") and rows[1][3] == ""
    assert "taylor" in found.report() and "it cannot" in found.report()
    with pytest.raises(InvalidRecipe, match="No method met the budget .* other: it cannot"):
        _ = made_up({"other": None}).best


def test_collapse_and_effective_sparsity_are_shown_for_masks():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    net[0].weight.data[:] = 1.0 + torch.eye(4)
    net[2].weight.data[:] = 1e-6  # a global ranking removes all of them
    found = compare(
        net, torch.zeros(1, 4), budget=sc.Budget(sparsity=0.5), metric=lambda net: 0.0, methods=["magnitude"], seeds=[0]
    )
    magnitude, random = found.candidates
    assert magnitude.effective_sparsity == 1 and 0.5 <= random.effective_sparsity < 1
    assert found.warning.startswith(
        "Warning, layer collapse: after magnitude, nothing of 0.weight, 2.weight has an effect. Where"
    )
    assert found.table().head[-1] == "effective sparsity" and found.table().rows[0][-1] == "100.00 %"
    assert found.warning in found.report()
    content = json.loads(json.dumps(found.as_dict()))["methods"]
    assert content[0]["collapsed"] == ["0.weight", "2.weight"] and content[1]["collapsed"] == []
    assert content[0]["effective_sparsity"] == 1
    smaller = made_up({"taylor": [0.95], "random": [0.9]})
    assert smaller.warning == "" and smaller.table().head[-1] == "latency"
    assert [m["effective_sparsity"] for m in smaller.as_dict()["methods"]] == [None, None]


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
    assert not found.share


def test_failed_methods_come_last_whatever_the_metric(problem):
    found = compare(
        problem[0], torch.zeros(1, 8), budget=sc.Budget(sparsity=0.5), metric=lambda net: -521.97,
        methods=["taylor", "magnitude"], seeds=[0],
    )  # fmt: skip
    assert [c.method for c in found.candidates] == ["magnitude", "random", "taylor"]
    assert found.candidates[-1].pruned is None and found.table().rows[0][2] == f"{MINUS}521.97"


def test_what_cannot_be_compared_is_refused_at_once(problem):
    model, train, held_out = problem
    with pytest.raises(DataNeeded, match="validation="):
        compare(model, torch.zeros(1, 8), budget=sc.Budget(macs=0.5), data=train)
    with pytest.raises(UnknownName, match="Did you mean 'taylor'"):
        compare(model, torch.zeros(1, 8), budget=sc.Budget(macs=0.5), validation=held_out, methods=["tailor"])
    with pytest.raises(UnknownName, match="Unknown engine 'tensorrt'.*eager"):
        compare(model, torch.zeros(1, 8), budget=sc.Budget(macs=0.5), validation=held_out, engine="tensorrt")
