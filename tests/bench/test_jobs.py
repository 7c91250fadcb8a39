"""Jobs for real, on a small benchmark; what kills them is tested in test_kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.bench import jobs
from secateur.bench.benchmarks import read_benchmark
from secateur.bench.jobs import Workplace, attempt, run_job
from secateur.bench.measurements import share
from secateur.bench.plan import plan
from secateur.bench.store import Store
from secateur.errors import BudgetUnreachable, DataUnavailable

TINY = read_benchmark(Path(__file__).parent / "tiny.yaml")
RUNS = plan(TINY, str(TINY.task.data), seeds=[0])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return Workplace(results=folder / "results", scratch=folder / "scratch", engines=())


def find(arm, granularity="channel"):
    return next(r for r in RUNS if r.arm == arm and (arm == "dense" or r.granularity == granularity))


def test_a_job_measures_the_pruned_network_and_can_be_repeated(place, tmp_path):
    record = run_job(find("magnitude"), place)
    measured = record.measured
    assert record.status == "ok" and 0.45 < measured.reached <= 0.5
    assert measured.reached == pytest.approx(measured.after.macs / measured.before.macs)
    assert measured.proof < 1e-5 and all(after <= before for before, after in measured.widths.values())
    assert measured.training.steps == 3 and measured.training.samples == 90 and measured.metrics["accuracy"].n == 600
    seconds = record.machine.seconds
    assert 0 < seconds["pruning and recovery"] < seconds["total"] and 0 < seconds["cpu"] <= 1.1 * seconds["total"]
    assert Store(place.results).find(record.run) == record and not place.network(record.run).exists()
    elsewhere = place.model_copy(update={"results": tmp_path, "keep_networks": True})
    again = run_job(find("magnitude"), elsewhere)
    assert again.repeatable() == record.repeatable() and place.network(record.run).stat().st_size == measured.file_bytes


def test_masked_networks_and_networks_from_scratch_are_jobs_like_others(place):
    weights = run_job(find("random", "weight"), place).measured
    assert weights.reached == pytest.approx(0.9, abs=1e-3) and weights.after.params == weights.before.params
    assert weights.sparsity > 0.85 and weights.widths == {} and weights.proof is None
    scratch = run_job(find("scratch-e"), place)
    assert scratch.run.role == "control" and scratch.measured.training.steps == 3
    assert scratch.measured.samples_scored == 0


def test_the_dense_reference_is_trained_once(place, monkeypatch):
    record = run_job(find("dense"), place)
    assert record.measured.before == record.measured.after and record.measured.history[-1]["step"] == 3
    monkeypatch.setattr(jobs, "train_reference", None)  # nothing trains it again
    pruned = run_job(find("random"), place)
    assert pruned.measured.dense_metric == record.value
    other = TINY.model_copy(update={"name": "other/benchmark", "version": TINY.version + 1})
    same = run_job(plan(other, str(TINY.task.data), seeds=[0])[0], place)  # nor for another benchmark
    assert same.measured.weights == record.measured.weights and same.id != record.id
    longer = plan(other.model_copy(update={"training": TINY.training.model_copy(update={"lr": 0.5})}), "0" * 16)[0]
    assert place.network(longer) != place.network(record.run)


def test_a_method_that_fails_leaves_a_record_that_says_why(place, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise BudgetUnreachable("too small")

    monkeypatch.setattr(jobs, "prune", fail)
    there = place.model_copy(update={"results": tmp_path})
    assert attempt(find("taylor"), there).problem is None
    record = Store(tmp_path).find(find("taylor"))
    assert record.status == "failed" and record.error.type == "BudgetUnreachable"
    assert record.error.message == "too small" and "raise BudgetUnreachable" in record.error.traceback


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), DataUnavailable("no data"), MemoryError()])
def test_what_is_not_the_methods_fault_leaves_no_record(place, tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(jobs, "prune", fail)
    ended = attempt(find("taylor"), place.model_copy(update={"results": tmp_path}))
    assert ended.problem == "halt" and type(error).__name__ in ended.message and list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_very_end_leaves_no_record(place, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "publish", full)
    assert attempt(find("random"), place.model_copy(update={"results": tmp_path})).problem == "halt"


def test_a_share_has_wilsons_interval():
    found = share(0.5, 100)  # z² = 3.8415: center 0.5, half-width z sqrt(0.0025 + z²/40000) / (1 + z²/100)
    assert (found.low, found.high) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert share(1.0, 10).high == 1.0 and share(1.0, 10).low == pytest.approx(10 / (10 + 3.84146), abs=1e-5)
