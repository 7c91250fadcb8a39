from __future__ import annotations

import pytest
from tests.bench.test_records import make_record

from secateur.bench import runner
from secateur.bench.benchmarks import Variant, find_benchmark
from secateur.bench.executors import make_executor
from secateur.bench.jobs import Ended, Workplace
from secateur.bench.plan import plan
from secateur.bench.records import Reported
from secateur.bench.store import Store
from secateur.errors import AlreadyRunning, MissingDependency, UnknownName

BENCHMARK = find_benchmark("digits/resnet8")
RUNS = plan(BENCHMARK, str(BENCHMARK.task.data), ["taylor", "random"])
ALL_RUNS = plan(BENCHMARK, str(BENCHMARK.task.data))


class Fake:
    """An executor whose jobs write made-up records; `trouble` says how a run ends instead."""

    capacity = 2

    def __init__(self, store, trouble=None):
        self.store, self.trouble = store, trouble or (lambda run, attempt: None)
        self.started, self.now = [], []

    def submit(self, run):
        assert len(self.now) < self.capacity
        self.started.append(run)
        self.now.append(run)

    def wait(self, timeout):
        run = self.now.pop(0)
        problem = self.trouble(run, self.started.count(run))
        if problem is None:
            self.store.publish(make_record(run))
        return [Ended(run, problem, "it broke" if problem else "")]

    def progress(self):
        return {run.id: 0.5 for run in self.now}

    def close(self):
        pass


def test_everything_is_run_once_dense_references_first(tmp_path):
    store = Store(tmp_path)
    fake = Fake(store)
    seen = []
    progress = runner.run_benchmark(runner.survey(RUNS, store), store, fake, lambda p: seen.append(len(p.done)))
    assert progress.left == 0 and progress.problems == [] and seen == list(range(1, len(RUNS) + 1))
    assert sorted(r.id for r in fake.started) == sorted(r.id for r in RUNS)
    for seed in BENCHMARK.seeds:
        assert next(r for r in fake.started if r.seed == seed).role == "dense"
    again = Fake(store)
    assert runner.run_benchmark(runner.survey(RUNS, store), store, again).left == 0 and again.started == []


def test_equal_work_of_another_benchmark_is_taken_over_if_it_could_be_official_here(tmp_path):
    store = Store(tmp_path)
    setting = {"method": "under-another-name", "granularity": "weight", "budget": {"sparsity": 0.9}}
    figure = Reported(**setting, metric="accuracy", value=0.5, source="a paper")
    changes = {"name": "digits/other", "version": 7, "reported": (figure,), "engines": ("eager", "onnxruntime")}
    ours = BENCHMARK.model_copy(update=changes | {"variants": {"under-another-name": Variant(method="taylor")}})
    asked = plan(ours, str(ours.task.data), ["under-another-name"], seeds=[0])
    for run in ALL_RUNS:  # timed in one engine; the second seed by code that was not committed
        if run.arm in ("taylor", "random"):
            store.publish(make_record(run, accuracy=0.7, clean=run.seed != 1))
        if run.arm == "scratch-e" and run.granularity == "weight":
            store.publish(make_record(run.model_copy(update={"version": 1})))
        if run.arm == "snip":
            store.publish(make_record(run, status="failed"))
    progress = runner.survey(asked, store)
    runner.take_over(progress, store, ours)
    by_budget = {record.run.budget_label: record for record in progress.done.values()}
    assert by_budget.keys() == {"sparsity=0.9", "sparsity=0.95"}  # the smaller networks must be timed in both engines
    record = by_budget["sparsity=0.9"]
    assert record == store.find(record.run) and record.value == 0.7
    assert (record.run.benchmark, record.run.version, record.run.arm) == ("digits/other", 7, "under-another-name")
    assert record.reported == (figure,) and by_budget["sparsity=0.95"].reported == ()
    dirty = runner.survey(plan(ours, str(ours.task.data), ["under-another-name"], seeds=[1]), store)
    runner.take_over(dirty, store, ours)
    assert dirty.done == {}
    others = runner.survey(plan(ours, str(ours.task.data), ["scratch-e", "snip"], seeds=[0]), store)
    runner.take_over(others, store, ours)
    assert others.done == {}  # of an earlier version, where the same run had another figure, and failed


def test_a_job_whose_process_dies_is_started_again_and_costs_only_itself(tmp_path):
    store = Store(tmp_path)
    victim, hopeless = RUNS[4], RUNS[7]

    def trouble(run, attempt):
        return "died" if run == hopeless or (run == victim and attempt < 3) else None

    fake = Fake(store, trouble)
    progress = runner.run_benchmark(runner.survey(RUNS, store), store, fake)
    assert progress.left == 1 and progress.problems == ["it broke"] and victim.id in progress.done
    assert fake.started.count(victim) == fake.started.count(hopeless) == 3 == runner.ATTEMPTS
    assert runner.run_benchmark(runner.survey(RUNS, store), store, Fake(store)).left == 0


def test_after_a_full_disk_nothing_new_is_started(tmp_path):
    store = Store(tmp_path)
    fake = Fake(store, lambda run, attempt: "halt" if run == RUNS[5] else None)
    progress = runner.run_benchmark(runner.survey(RUNS, store), store, fake)
    assert progress.problems == ["it broke"] and 0 < progress.left < len(RUNS)
    assert progress.left == len(RUNS) - len(fake.started) + 1  # what was under way was finished


def test_without_its_dense_reference_nothing_is_pruned(tmp_path):
    store = Store(tmp_path)
    fake = Fake(store, lambda run, attempt: "died" if run.role == "dense" else None)
    progress = runner.run_benchmark(runner.survey(RUNS, store), store, fake)
    assert progress.left == len(RUNS) and all(run.role == "dense" for run in fake.started)


@pytest.mark.parametrize(("again", "expected"), [("none", set()), ("failed", {1}), ("unofficial", {1, 2})])
def test_records_can_be_made_anew(tmp_path, again, expected):
    store = Store(tmp_path / "results")
    place = Workplace(results=tmp_path / "results", scratch=tmp_path / "scratch")
    runs = RUNS[3:6]
    for run, what in zip(runs, ({}, {"status": "failed"}, {"clean": False}), strict=True):
        store.publish(make_record(run, **what))
    place.network(runs[2]).parent.mkdir(parents=True)
    place.network(runs[2]).touch()
    progress = runner.survey(runs, store)
    runner.forget(progress, store, place, BENCHMARK, again)
    assert {i for i, run in enumerate(runs) if run.id not in progress.done} == expected
    assert {i for i, run in enumerate(runs) if store.find(run) is None} == expected
    assert place.network(runs[2]).exists() == (2 not in expected)


def test_the_estimate_takes_the_median_of_the_group_and_else_of_the_role(tmp_path):
    records = []
    times = ({"total": 2.0}, {"total": 90.0, "cpu": 4.0}, {"total": 9.0})  # the second one shared its processor
    for run, seconds in zip([r for r in RUNS if r.group == ("taylor", "channel", "macs=0.5")], times, strict=True):
        record = make_record(run)
        records.append(record.model_copy(update={"machine": record.machine.model_copy(update={"seconds": seconds})}))
    todo = [RUNS[0], *(r for r in RUNS if r.arm == "taylor" and r.seed == 0)]  # dense: never timed; weight: neither
    found = runner.estimate(runner.Progress(tuple(todo)), records, jobs=2)
    assert (found.missing, found.known) == (5, 2) and found.seconds == pytest.approx(5 * 4 / 2)
    assert runner.estimate(runner.Progress(tuple(todo)), [], 2).known == 0


def test_one_runner_at_a_time(tmp_path):
    with runner.only_runner(tmp_path), pytest.raises(AlreadyRunning, match="Another runner"):
        with runner.only_runner(tmp_path):
            pass
    with runner.only_runner(tmp_path):
        pass


def test_half_written_files_are_swept_away(tmp_path):
    (tmp_path / "a").mkdir()
    for name in (".x.json.abc.json", "a/.y.safetensors", "a/z.json"):
        (tmp_path / name).touch()
    runner.sweep(tmp_path, tmp_path / "none")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["z.json"]


def test_executors_are_found_by_name_and_say_what_to_install(tmp_path, monkeypatch):
    place = Workplace(results=tmp_path, scratch=tmp_path)
    with pytest.raises(UnknownName, match="local, ray, slurm"):
        make_executor("cloud", place, 2)
    for name, module in (("ray", "ray"), ("slurm", "submitit")):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(MissingDependency, match=rf"pip install 'secateur\[{name}\]'"):
            make_executor(name, place, 2)
