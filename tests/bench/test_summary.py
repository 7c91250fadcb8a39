from __future__ import annotations

import pytest
from tests.bench.test_records import make_record

from secateur.bench.benchmarks import find_benchmark, plan
from secateur.bench.summary import fronts, summarize

BENCHMARK = find_benchmark("digits/resnet8")
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


def test_the_front_of_an_arm_is_its_hypervolume_over_the_ladder():
    records = [make_record(r, accuracy=ACCURACY[r.arm]) for r in RUNS if r.arm in ("taylor", "dense")]
    halved = {**records[3].measured.after.model_dump(), "effective_macs": 50}
    for i, record in enumerate(records):
        if record.run.role != "dense":
            after = record.measured.after.model_copy(update=halved)
            records[i] = record.model_copy(update={"measured": record.measured.model_copy(update={"after": after})})
    found = fronts(summarize(records, BENCHMARK))
    assert found == {("taylor", "channel"): pytest.approx(0.475), ("taylor", "weight"): pytest.approx(0.475)}
