from __future__ import annotations

import json

import pytest

from secateur.bench import records
from secateur.bench.benchmarks import find_benchmark
from secateur.bench.plan import dense_run, plan
from secateur.bench.records import Record, hash_of, read_record, to_text
from secateur.bench.store import Store, standing
from secateur.errors import InvalidRecord

BENCHMARK = find_benchmark("digits/resnet8")
RUNS = plan(BENCHMARK, str(BENCHMARK.task.data))
SIZE = {"params": 10, "nonzero_params": 10, "macs": 100, "effective_macs": 100, "bytes": 40}


def make_record(run, *, clean=True, commit="c0ffee", timed=True, status="ok", accuracy=0.9) -> Record:
    """A record with made-up figures."""
    quantiles = {"p50_ms": 1.0, "p90_ms": 2.0, "n": 20}
    timing = {"engine": "eager", "threads": 1, "batch": 1, "dtype": "float32", "dense": quantiles, "pruned": quantiles}
    measured = {
        "metrics": {"accuracy": {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01, "n": 600}},
        "dense_metric": 0.99,
        "before": SIZE,
        "after": {**SIZE, "params": SIZE["params"] // 2} if run.granularity == "channel" else SIZE,
        "file_bytes": 100,
        "reached": None if run.role == "dense" else 0.5,
        "sparsity": 0.0,
        "effective_sparsity": None,
        "samples_scored": 0,
        "training": {"steps": 1, "samples": 1, "macs": 1},
        "proof": None,
        "widths": {},
        "history": [],
        "weights": "0" * 16,
    }
    return Record.model_validate(
        {
            "schema": records.SCHEMA,
            "id": run.id,
            "run": run.model_dump(mode="json"),
            "status": status,
            "measured": measured if status == "ok" else None,
            "error": None if status == "ok" else {"type": "E", "message": "m", "traceback": "t"},
            "machine": {
                "created": "2026-01-01T00:00:00+00:00",
                "seconds": {"total": 1.0},
                "peak_memory_bytes": 1,
                "latency": {"eager": timing} if timed and run.granularity == "channel" else {},
                "environment": {"processor": "p"},
            },
            "code": {"version": "0", "commit": commit, "clean": clean},
        }
    )


def test_a_record_comes_back_as_it_was_written(tmp_path):
    store = Store(tmp_path)
    record = make_record(RUNS[5])
    assert store.publish(record) is record
    path = store.path(RUNS[5])
    assert path.relative_to(tmp_path).parts[:2] == ("digits", "resnet8") and read_record(path) == record
    assert store.find(RUNS[5]) == record and store.find(RUNS[6]) is None
    assert store.read() == ([record], []) and store.read("fashion-mnist/vit") == ([], [])
    assert store.path(RUNS[0]).name.startswith("dense-seed0-") and record.value == 0.9


def test_equal_runs_have_equal_ids_and_every_setting_counts():
    run = RUNS[5]
    assert run.id == run.model_copy(update={"recipe": {**run.recipe, "new": "default"}}).id
    others = [
        run.model_copy(update=change)
        for change in ({"seed": 7}, {"version": 7}, {"budget": {"macs": 0.3}}, {"recipe_hash": "x"}, {"data": "0"})
    ]
    assert len({run.id, *(other.id for other in others)}) == 6
    assert dense_run(run).id == RUNS[0].id and len({r.id for r in RUNS}) == len(RUNS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["measured"]["metrics"]["accuracy"].update(value=0.99), "changed after it was written"),
        (lambda c: c.update(schema=0), "schema 0; this secateur reads 1"),
        (lambda c: c.pop("schema"), "names no schema"),
        (lambda c: c.pop("sha256"), "changed after it was written"),
    ],
)
def test_an_edited_record_and_one_of_another_schema_are_refused(tmp_path, edit, message):
    store = Store(tmp_path)
    store.publish(make_record(RUNS[5]))
    path = store.path(RUNS[5])
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidRecord, match=message):
        read_record(path)
    found, refused = store.read()
    assert found == [] and refused[0].path == path and store.find(RUNS[5]) is None
    assert store.publish(make_record(RUNS[5])) == read_record(path)  # a refused file does not block the run


def test_what_cannot_be_is_refused_even_with_a_fitting_hash(tmp_path):
    path = tmp_path / "r.json"

    def refused(change, message):
        content = {**make_record(RUNS[5]).content(), **change}
        path.write_text(json.dumps({**content, "sha256": hash_of(content)}))
        with pytest.raises(InvalidRecord, match=message):
            read_record(path)

    refused({"id": "0" * 16}, "not that of the run")
    refused({"measured": None}, "a record that is ok has 'measured'")
    refused({"opinion": "good"}, "opinion: Extra inputs are not permitted")
    path.write_text("{")
    with pytest.raises(InvalidRecord, match="not JSON"):
        read_record(path)
    with pytest.raises(InvalidRecord, match="No such file"):
        read_record(tmp_path / "none.json")


def test_a_record_under_the_name_of_another_run_is_refused(tmp_path):
    store = Store(tmp_path)
    store.publish(make_record(RUNS[5]))
    store.path(RUNS[5]).rename(store.path(RUNS[6]))
    assert "another run" in store.read()[1][0].reason and store.find(RUNS[6]) is None


def test_the_first_record_of_a_run_stays_unless_it_is_to_be_replaced(tmp_path):
    store = Store(tmp_path)
    store.publish(make_record(RUNS[5], accuracy=0.5))
    assert store.publish(make_record(RUNS[5], accuracy=0.6)).value == 0.5
    assert store.publish(make_record(RUNS[5], accuracy=0.6), replace=True).value == 0.6
    assert store.find(RUNS[5]).value == 0.6


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    store = Store(tmp_path)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        store.publish(make_record(RUNS[5]))
    assert list(store.path(RUNS[5]).parent.iterdir()) == []


def test_failures_are_records_without_a_value(tmp_path):
    store = Store(tmp_path)
    store.publish(make_record(RUNS[5], status="failed"))
    found = store.find(RUNS[5])
    assert found.error.message == "m"
    with pytest.raises(InvalidRecord, match="failed"):
        _ = found.value


def test_only_the_machines_part_may_differ_between_repetitions():
    record = make_record(RUNS[5])
    other = record.model_copy(update={"machine": record.machine.model_copy(update={"created": "later"})})
    assert record != other and record.repeatable() == other.repeatable() and "machine" not in record.repeatable()
    assert to_text(record) != to_text(other)


def test_official_needs_a_clean_tree_three_seeds_and_a_timed_network():
    group = [r for r in RUNS if r.group == ("taylor", "channel", "macs=0.5")]
    good = [make_record(run) for run in group]
    assert standing(good, BENCHMARK) == {record.id: () for record in good}
    assert set(standing(good[:2], BENCHMARK).values()) == {("2 seeds of at least 3",)}
    for change, reason in (
        ({"clean": False}, "not committed"),
        ({"commit": None}, "outside a git checkout"),
        ({"timed": False}, "not timed"),
        ({"status": "failed"}, "failed"),
    ):
        found = standing([*good[:2], make_record(group[2], **change)], BENCHMARK)
        assert reason in found[group[2].id][0]
        assert found[group[0].id] == ("2 seeds of at least 3",)  # the others lack a third
    newer = BENCHMARK.model_copy(update={"version": BENCHMARK.version + 1})
    assert f"version {BENCHMARK.version} of the benchmark" in standing(good, newer)[good[0].id][0]


def test_unstructured_networks_need_no_timing():
    group = [make_record(r, timed=False) for r in RUNS if r.group == ("taylor", "weight", "sparsity=0.9")]
    assert len(group) == 3 and not any(standing(group, BENCHMARK).values())
