from __future__ import annotations

import pytest
from tests.bench.test_records import make_record

from secateur.bench.benchmarks import Claim, find_benchmark
from secateur.bench.plan import plan
from secateur.bench.summary import check_claims, check_masks, fronts, summarize
from secateur.core.budget import Budget
from secateur.errors import InvalidRecipe, UnknownName

BENCHMARK = find_benchmark("digits/resnet8")
CHECKS = ("+shuffled", "+fresh")
ACCURACY = {"dense": 0.99, "taylor": 0.95, "magnitude": 0.94, "random": 0.90, "scratch-e": 0.97, "scratch-b": 0.98}
RUNS = plan(BENCHMARK, str(BENCHMARK.task.data), methods=[arm for arm in ACCURACY if arm != "dense"])


def test_a_row_stands_beside_its_controls_at_the_same_budget():
    records = [make_record(r, accuracy=ACCURACY[r.arm] + 0.001 * r.seed) for r in RUNS]
    rows = summarize(records, BENCHMARK)
    assert [row.arm for row in rows[:7]] == [
        "dense", "scratch-b", "scratch-e", "taylor", "magnitude", "random", "scratch-b"
    ]  # fmt: skip
    assert [row.budget for row in rows[:7]] == ["", *["macs=0.5"] * 5, "macs=0.25"]
    taylor = rows[3]
    assert taylor.value.mean == pytest.approx(0.951) and taylor.value.n == 3 and taylor.official
    assert taylor.against["random"].difference.mean == pytest.approx(0.05)
    assert taylor.against["random"].verdict == "better" and taylor.against["scratch-e"].verdict == "worse"
    assert taylor.rank == 3 and taylor.speedup("eager").mean == 1 and taylor.speedup("openvino") is None
    assert taylor.mean("macs") == 100


def test_failures_and_missing_seeds_are_shown():
    group = [r for r in RUNS if r.group == ("taylor", "channel", "macs=0.5")]
    (row,) = summarize([make_record(group[0]), make_record(group[1], status="failed")], BENCHMARK)
    assert row.value.n == 1 and len(row.failures) == 1 and not row.official and row.against == {}
    assert row.reasons == ("1 seed of at least 3", "failed")
    (row,) = summarize([make_record(group[1], status="failed")], BENCHMARK)
    assert row.value is None and row.rank is None


def test_effective_sparsity_is_that_of_masks():
    runs = [r for r in RUNS if r.arm in ("dense", "taylor") and r.budget_label in ("", "macs=0.5", "sparsity=0.9")]
    records = []
    for run in runs:
        record = make_record(run)
        shares = {"effective_sparsity": 0.91 + 0.01 * run.seed}
        records.append(record.model_copy(update={"measured": record.measured.model_copy(update=shares)}))
    dense, channel, weight = summarize(records, BENCHMARK)
    assert weight.effective_sparsity == pytest.approx(0.92)
    assert dense.effective_sparsity is channel.effective_sparsity is None
    (unknown,) = summarize([make_record(r) for r in runs if "sparsity" in r.label], BENCHMARK)
    assert unknown.effective_sparsity is None


def test_a_control_that_was_trained_less_is_no_rival():
    steps = {"taylor": 100, "magnitude": 50, "random": 50, "scratch-e": 100, "scratch-b": 99.5}
    records = []
    for run in RUNS:
        record = make_record(run, accuracy=ACCURACY[run.arm])
        training = record.measured.training.model_copy(update={"steps": int(steps.get(run.arm, 100) * 10)})
        records.append(
            record.model_copy(update={"measured": record.measured.model_copy(update={"training": training})})
        )
    rows = {row.arm: row for row in summarize(records, BENCHMARK) if row.budget == "macs=0.5"}
    assert rows["taylor"].against.keys() == {"scratch-e", "scratch-b"}  # half a step in a hundred is rounding
    assert rows["magnitude"].against.keys() == {"random", "scratch-e", "scratch-b"}
    assert rows["scratch-e"].against.keys() == {"scratch-b"} and rows["random"].against.keys() == {
        "scratch-e",
        "scratch-b",
    }


def claim(arm="taylor", above="magnitude", budgets=None):
    return Claim(method="taylor", says="is better", source="a paper", arm=arm, above=above, budgets=budgets)


def test_claims_of_papers_are_decided_by_the_records_at_each_budget():
    # taylor is 0.01 above magnitude by every seed at most budgets, and by chance at 25 % of the MACs
    unsure = {0: 0.2, 1: -0.1, 2: 0.0}
    records = [
        make_record(r, accuracy=ACCURACY[r.arm] + unsure[r.seed] * ("macs=0.25" in r.label and r.arm == "taylor"))
        for r in RUNS
        if r.arm in ("taylor", "magnitude", "scratch-b")
    ]
    budgets = (Budget(macs=0.5), Budget(macs=0.25))
    benchmark = BENCHMARK.model_copy(
        update={"claims": (claim(budgets=budgets), claim("taylor", "scratch-b"), claim("taylor", "scratch-e"))}
    )
    found = check_claims(summarize(records, benchmark), benchmark)
    assert [(c.above.arm, c.arm.budget, c.verdict) for c in found] == [
        ("magnitude", "macs=0.5", "holds"),
        ("magnitude", "macs=0.25", "undecided"),
        ("scratch-b", "macs=0.5", "does not hold"),
        ("scratch-b", "macs=0.25", "undecided"),
    ]  # scratch-e has no records, scratch-b none for single weights
    assert found[0].paired.difference.mean == pytest.approx(0.01) and found[0].claim.method == "taylor"


def test_a_mask_is_judged_by_what_its_sanity_checks_lose_and_only_when_both_have_run():
    runs = plan(BENCHMARK, str(BENCHMARK.task.data), [f"{m}{c}" for m in ("snip", "grasp") for c in ("", *CHECKS)])
    lost = {"snip": 0.0, "snip+shuffled": 0.05, "snip+fresh": -0.02, "grasp": 0.0, "grasp+fresh": 0.1}
    records = [make_record(r, accuracy=0.9 - lost[r.arm] + 0.001 * r.seed) for r in runs if r.arm in lost]
    found = check_masks(summarize(records, BENCHMARK))
    assert [(c.row.arm, c.row.budget) for c in found] == [("snip", "sparsity=0.9"), ("snip", "sparsity=0.95")]
    shuffled, fresh = (found[0].paired[check] for check in ("shuffled", "fresh"))
    assert shuffled.difference.mean == pytest.approx(-0.05) and shuffled.verdict == "worse"
    assert fresh.difference.mean == pytest.approx(0.02) and fresh.verdict == "better"
    assert found[0].checks["fresh"].value.mean == pytest.approx(0.921)
    for i, record in enumerate(records):
        if record.run.arm == "snip+fresh":
            training = record.measured.training.model_copy(update={"steps": 100})
            records[i] = record.model_copy(
                update={"measured": record.measured.model_copy(update={"training": training})}
            )
    assert check_masks(summarize(records, BENCHMARK))[0].paired.keys() == {"shuffled"}  # more training, other figures


def test_a_claim_is_about_arms_that_the_benchmark_has():
    content = BENCHMARK.model_dump(mode="json", exclude_defaults=True)
    with pytest.raises((InvalidRecipe, UnknownName), match="tailor.*Did you mean 'taylor'"):
        type(BENCHMARK)(**{**content, "claims": [claim("tailor").model_dump(mode="json", exclude_defaults=True)]})


def test_the_front_of_an_arm_is_its_hypervolume_over_the_ladder():
    records = [make_record(r, accuracy=ACCURACY[r.arm]) for r in RUNS if r.arm in ("taylor", "dense")]
    halved = {**records[3].measured.after.model_dump(), "effective_macs": 50}
    for i, record in enumerate(records):
        if record.run.role != "dense":
            after = record.measured.after.model_copy(update=halved)
            records[i] = record.model_copy(update={"measured": record.measured.model_copy(update={"after": after})})
    found = fronts(summarize(records, BENCHMARK))
    assert found == {("taylor", "channel"): pytest.approx(0.475), ("taylor", "weight"): pytest.approx(0.475)}
