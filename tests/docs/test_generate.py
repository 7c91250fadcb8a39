"""What the generated blocks of the cards say of records."""

from __future__ import annotations

import pytest
from tests.bench.test_records import make_record

from docs import generate
from secateur.bench.benchmarks import find_benchmark
from secateur.bench.plan import plan
from secateur.bench.store import Store

BENCHMARK = find_benchmark("digits/resnet8")


def trained_for(steps, record):
    training = record.measured.training.model_copy(update={"steps": steps})
    return record.model_copy(update={"measured": record.measured.model_copy(update={"training": training})})


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"taylor": 10}, "No control has an official record at channel, 50 % of the MACs."),
        (
            {"taylor": 10, "random": 5, "scratch-e": 5},
            "Trained longer than every control, so that a difference would say nothing, at channel, 50 % of the MACs.",
        ),
        ({"taylor": 10, "random": 10}, "Better than random pruning at channel, 50 % of the MACs."),
    ],
)
def test_no_control_is_not_the_same_as_none_that_was_trained_as_long(tmp_path, monkeypatch, arms, words):
    store = Store(tmp_path / "results" / "records")
    for run in plan(BENCHMARK, str(BENCHMARK.task.data), methods=list(arms)):
        if run.budget_label == "macs=0.5":
            accuracy = 0.8 + 0.1 * (run.arm == "taylor") + 0.001 * run.seed
            store.publish(trained_for(arms[run.arm], make_record(run, accuracy=accuracy)))
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    table = generate.records_table("taylor")
    assert words in table and table.count(" at channel, 50 % of the MACs.") == 1
