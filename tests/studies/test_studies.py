"""The parts of the studies against closed forms; the studies themselves are run by their command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from secateur.errors import UnknownName
from secateur.measure.figures import lines_figure
from secateur.measure.safe_sparsity import safe_sparsity
from secateur.parts.mean_field import chi
from secateur.studies import STUDIES, find_study, pruned_fraction, wide_prior
from secateur.studies.edge_of_chaos import relu_correlation, travel
from secateur.studies.pruned_fraction import Setting, train
from secateur.studies.safe_sparsity import ClassNeurons, train_multilayer
from secateur.studies.study import Claim, Exhibit, Findings, Study


def test_the_correlation_map_of_relu():
    assert relu_correlation(1.0) == pytest.approx(1.0) and relu_correlation(0.0) == pytest.approx(1 / math.pi)


def test_masks_lose_variance_and_rescaling_keeps_it(monkeypatch):
    from secateur.studies import edge_of_chaos

    for name, value in (("WIDTH", 200), ("DEPTH", 10), ("DRAWS", 4)):
        monkeypatch.setattr(edge_of_chaos, name, value)
    pruned, rescaled = (travel(0.8, again, torch.Generator().manual_seed(0)) for again in (False, True))
    alpha = [b / a for a, b in zip(pruned.kept_variance, pruned.kept_variance[1:], strict=False)]
    z = 1.2815515655446004  # 80 % of normal weights are smaller in size
    expected = 1 - math.erf(z / math.sqrt(2)) + math.sqrt(2 / math.pi) * z * math.exp(-z * z / 2)
    assert all(a == pytest.approx(expected, rel=0.02) for a in alpha)
    assert pruned.variance[-1] / pruned.variance[0] == pytest.approx(expected**9, rel=0.6)
    assert 0.4 < rescaled.variance[-1] / rescaled.variance[0] < 2.5


def test_a_signal_that_no_neuron_sees_is_not_learned():
    small = Setting(classes=2, inputs=50, neurons=6, samples=8, steps=200, test_samples=60)
    dense, gone = train(small, 1.0, 0), train(small, 1e-9, 0)
    assert dense.survivors == 1 and dense.train_loss < 0.01 and dense.test_accuracy > 0.9
    assert 1 - dense.test_accuracy <= dense.error_bound < gone.error_bound == 1
    assert gone.survivors == 0 and gone.test_loss == pytest.approx(math.log(2)) == gone.train_loss


def test_the_bound_on_the_test_error_is_hand_computed_and_holds():
    setting = Setting(classes=2, inputs=3, neurons=1, noise=0.5)
    weight = torch.tensor([[3.0, 0.0, 2.0], [0.0, 3.0, -1.0]])
    # Without noise the roots of a sample of class 0 are 3 and 0; they move by 0.5 * 2 and 0.5 * 1 per unit of noise.
    bound = setting.error_bound(weight, torch.eye(2, 3), torch.tensor([0, 1]))
    assert bound == pytest.approx(math.exp(-9 / (2 * 1.5**2)))
    x, labels = setting.draw(4000, torch.Generator().manual_seed(0))
    wrong = float((setting.logits(weight, x).argmax(1) != labels).float().mean())
    assert 0.001 < wrong < setting.error_bound(weight, x, labels) < 1
    assert setting.error_bound(torch.zeros(2, 3), x, labels) == 1


def test_the_theorys_network_as_a_module_and_its_safe_density():
    setting = Setting(inputs=300)
    net, (x, labels) = ClassNeurons(setting), setting.draw(40, torch.Generator().manual_seed(0))
    together = torch.cat([neurons.weight for neurons in net.classes])
    assert torch.allclose(net(x), setting.logits(together, x))
    for layer in safe_sparsity(net, [(x, labels)], draws=2).layers:
        assert layer.signals == 4 and layer.density == pytest.approx(1 - (0.0125 / 4) ** (1 / 40), abs=1e-6)


def test_the_network_for_digits_needs_its_weights(monkeypatch):
    from secateur.studies import safe_sparsity

    labels = torch.arange(200) % 10
    split = SimpleNamespace(inputs=torch.eye(576)[labels].view(-1, 1, 24, 24), targets=labels)
    task = SimpleNamespace(splits=SimpleNamespace(train=split, test=split))
    monkeypatch.setattr(safe_sparsity, "find_task", lambda name: task)
    monkeypatch.setattr(safe_sparsity, "STEPS", 40)
    names = ("1.weight", "3.weight", "5.weight")
    loss, accuracy = train_multilayer(dict.fromkeys(names, 2.0), 0)
    assert loss < 0.5 and accuracy == 1
    loss, accuracy = train_multilayer(dict.fromkeys(names, 0.0), 0)
    assert accuracy == pytest.approx(0.1) and loss == pytest.approx(math.log(10), abs=0.1)


def test_wide_networks_are_solved_and_narrow_ones_are_not(monkeypatch):
    monkeypatch.setattr(wide_prior, "STEPS", 400)
    losses, narrow = (wide_prior.solve(wide_prior.problems(width, 1.0, 1.0, 0)) for width in (320, 8))
    assert len(losses) <= 401 and int((losses[-1] <= wide_prior.SOLVED).sum()) >= 9
    assert len(narrow) == 401 and float(narrow.min()) > wide_prior.SOLVED


def test_pruned_weights_of_a_prior_stay_zero(monkeypatch):
    monkeypatch.setattr(wide_prior, "STEPS", 5)
    given = wide_prior.problems(30, 0.3, 0.3**-0.5, 0)
    before = given.net.w.detach().clone()
    losses = wide_prior.solve(given)
    after = given.net.w.detach()
    assert (losses[1:] < losses[:-1]).all() and not after[~given.mask].any()
    assert float(given.mask.double().mean()) == pytest.approx(0.3, abs=0.02)
    assert ((after != before) == given.mask).all()


def test_the_loss_falls_at_least_at_the_rate_of_the_bound_where_the_condition_holds(monkeypatch):
    for name, value in (("DRAWS", 1), ("STEPS", 200)):
        monkeypatch.setattr(wide_prior, name, value)
    wide, narrow = (wide_prior.outcome(width, 1.0, 1.0, 0) for width in (10240, 40))
    assert max(wide.ratios) < 1 < min(narrow.ratios) and len(wide.steps) == 1
    assert all(rate >= bound > 0 for rate, bound in zip(wide.rates, wide.bounds, strict=True))
    # At its mean rate a loss reaches the goal in its number of steps; the smallest mean is no larger than the last one.
    given = wide_prior.problems(10240, 1.0, 1.0, 0)
    start = (given.net(given.u) - given.y).detach().square().sum((1, 2)) / 2
    for loss, steps, rate in zip(start.tolist(), wide.steps, wide.rates, strict=True):
        assert 0 < rate <= math.log(loss / wide_prior.SOLVED) / (wide_prior.STEP * (steps - 1))


def test_the_steps_in_the_limit_of_width_are_counted_by_hand(monkeypatch):
    monkeypatch.setattr(wide_prior, "CONDITION", 1.0)  # so that A Aᵀ is the identity, and all parts shrink alike
    given = wide_prior.problems(50, 1.0, 1.0, 0)
    start = (given.net(given.u) - given.y).detach().square().sum((1, 2)) / 2
    for loss, steps in zip(start.tolist(), wide_prior.limit_steps(given, 0.4), strict=True):
        shrinks = (1 - 0.4 * wide_prior.STEP) ** 2
        assert loss * shrinks**steps <= wide_prior.SOLVED < loss * shrinks ** (steps - 1)


def test_the_claims_of_the_steps_are_judged_as_they_are_found(monkeypatch):
    monkeypatch.setattr(wide_prior, "WIDTHS", (320, 640))

    def claims(*dense):
        own = [wide_prior.Outcome([steps] * wide_prior.DRAWS if steps else [], [], [], []) for steps in dense]
        slow = {w: wide_prior.Outcome([300], [], [], []) for w in (320, 640)}
        found = {"dense": dict(zip((320, 640), own, strict=True)), "pruned": slow, "pruned, rescaled": slow}
        limits = {"dense": 100, "pruned": 300, "pruned, rescaled": 300}
        return [claim.holds for claim in wide_prior._claims_of_the_steps(found, limits)]

    assert claims(150, 101)[:2] == [True, True] and claims(101, 102)[:2] == [False, True]
    assert claims(300, 200)[:2] == [True, False] and claims(0, 0)[:2] == [False, False]


def test_a_study_of_networks_too_narrow_for_any_rate_says_so(monkeypatch):
    for name, value in (("WIDTHS", (4, 8)), ("DRAWS", 2), ("STEPS", 5)):  # J has 10 rows, and its rank is the width
        monkeypatch.setattr(wide_prior, name, value)
    findings = wide_prior.run(0, lambda *_: None)
    bounds = [b for own in findings.data["networks"].values() for o in own.values() for b in o["bounds"]]
    assert bounds == [0] * 12 and not any(claim.holds for claim in (*findings.claims[:4], findings.claims[-1]))
    assert findings.claims[1].found == "no width at which all are solved"


def test_guessing_is_judged_by_its_binomial_error():
    learned = {"train_loss": 0.001, "test_loss": 2.0, "test_accuracy": 0.26}
    assert pruned_fraction._claim_by_heart(Setting(), learned).holds
    # 3 sqrt(0.25 * 0.75 / 5000) = 0.0184
    for worse in ({"test_accuracy": 0.27}, {"test_accuracy": 0.23}, {"train_loss": 0.1}, {"test_loss": 1.3}):
        assert not pruned_fraction._claim_by_heart(Setting(), learned | worse).holds


def test_the_threshold_is_where_the_first_of_all_signals_is_missed():
    # 4 classes x 5 networks: (1 - 0.85^40)^20 = 0.970, (1 - 0.9^40)^20 = 0.742
    assert pruned_fraction._below_the_threshold(Setting()) == [1.0, 0.7, 0.5, 0.3]
    assert pruned_fraction._below_the_threshold(Setting(neurons=100))[-1] == 0.2  # (1 - 0.9^100)^20 = 0.9995


def test_the_factor_restores_the_gram_matrix(monkeypatch):
    monkeypatch.setattr(wide_prior, "LATENT", 500)  # so that all units keep about the same share of their input
    dense, bare, mended = (wide_prior.mean_gram(400, *arm, 0) for arm in ((1.0, 1.0), (0.5, 1.0), (0.5, 0.5**-0.5)))
    assert mended == pytest.approx(dense, rel=0.05)
    assert dense == pytest.approx(chi("tanh", 1.0, 1.0), rel=0.05)
    assert bare == pytest.approx(0.5 * chi("tanh", 1.0, 0.5), rel=0.05)


def test_a_study_writes_its_page_and_its_numbers(tmp_path):
    claim = Claim("two is two", "arithmetic", "2", "2", True)
    findings = Findings(
        (claim, Claim("two is three", "nobody", "3", "2", False)),
        (
            Exhibit("Line", "A caption.", lines_figure({"a": [(1, 2), (2, 3)]}, "x", "y"), claims=(0,)),
            Exhibit("Other", "More.", claims=(0, 1)),
        ),
        {"n": 2},
    )
    line, other = (findings.caption(exhibit) for exhibit in findings.exhibits)
    assert line == "two is two (arithmetic): holds.\nA caption."
    assert "two is three (nobody): does not hold." in other.splitlines()
    study = Study("twice", "Twice", "Is it?", "Nobody", lambda seed, progress: findings)
    assert not study.report(tmp_path / "new", 3, lambda *_: None).holds
    record = json.loads((tmp_path / "new" / "twice.json").read_text())
    assert record["claims"][0]["holds"] and record["data"] == {"n": 2} and record["seed"] == 3
    page = (tmp_path / "new" / "twice.html").read_text()
    assert (
        "two is two" in page and "A caption." in page and "holds" in page and "https://" not in page.split("<script")[0]
    )
    assert line in page and other in page
    assert Findings((claim,), (), {}).holds


def test_every_study_is_listed_and_an_unknown_one_is_one_line():
    for name in STUDIES:
        assert find_study(name).name == name
    with pytest.raises(UnknownName, match="study 'cold-fusion'"):
        find_study("cold-fusion")
    code = "from secateur.cli.main import run; run()"
    done = subprocess.run([sys.executable, "-c", code, "study", "cold-fusion"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:") and len(done.stderr.splitlines()) == 1
    done = subprocess.run([sys.executable, "-c", code, "study", "--json"], capture_output=True, text=True)
    assert [row["name"] for row in json.loads(done.stdout)] == list(STUDIES)
