from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.bench.test_records import make_record
from typer.testing import CliRunner

from secateur.bench.benchmarks import find_benchmark
from secateur.bench.plan import plan
from secateur.bench.store import Store
from secateur.cli.main import app
from secateur.errors import InvalidFile, InvalidRecipe, UnknownName

BENCHMARK = find_benchmark("digits/resnet8")
RUNS = plan(BENCHMARK, str(BENCHMARK.task.data))
TINY = str(Path(__file__).parent.parent / "bench" / "tiny.yaml")


def invoke(*words):
    result = CliRunner().invoke(app, ["bench", *map(str, words)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def results(tmp_path):
    """Made-up records of everything but one run."""
    store = Store(tmp_path / "results")
    for run in RUNS[:-1]:
        store.publish(make_record(run, accuracy=0.9 + 0.01 * (run.arm == "taylor") + 0.001 * run.seed))
    return store.folder


def test_benchmarks_are_listed():
    assert "digits/resnet8" in invoke("list").output
    listed = json.loads(invoke("list", "--json").output)
    assert {"name": "digits/resnet8", "version": BENCHMARK.version, "title": BENCHMARK.title} in listed


def test_a_dry_run_names_what_is_missing_and_what_it_takes(results):
    text = invoke("run", "digits/resnet8", "--dry-run", "--results", results).output
    assert RUNS[-1].label in text and f"1 runs to do, {len(RUNS) - 1} done already; about 0 s" in text
    plan_now = json.loads(invoke("run", "digits/resnet8", "--dry-run", "--results", results, "--json").output)
    assert plan_now["missing"] == [{"id": RUNS[-1].id, "run": RUNS[-1].label}] and plan_now["seconds"] == 0.5
    narrow = ("--methods", "taylor", "--budgets", "macs=0.5", "--seeds", "7")
    text = invoke("run", "digits/resnet8", "--dry-run", "--results", results.parent / "none", *narrow).output
    assert text.split("\n")[:2] == ["dense seed 7", "taylor channel macs=0.5 seed 7"] and "time unknown" in text


def test_a_run_without_anything_to_do_shows_the_rows(results, tmp_path):
    store = Store(results)
    store.publish(make_record(RUNS[-1]))
    text = invoke("run", "digits/resnet8", "--dry-run", "--results", results).output
    assert text == f"Nothing to do: all {len(RUNS)} runs are done.\n"
    text = invoke("run", "digits/resnet8", "--results", results, "--scratch", tmp_path / "scratch").output
    assert "91.10 ± 0.25" in text and "+1.00 ▲" in text and "channel, macs=0.5" in text and "official" not in text
    ended = json.loads(
        invoke("run", "digits/resnet8", "--results", results, "--scratch", tmp_path / "scratch", "--json").output
    )
    assert len(ended["done"]) == len(RUNS) and (ended["failed"], ended["left"], ended["problems"]) == ([], 0, [])


def test_show_has_the_effective_sparsity_of_masks(results):
    run = next(r for r in RUNS if r.budget_label == "sparsity=0.9" and r.arm == "taylor")
    found = make_record(run)
    measured = found.measured.model_copy(update={"effective_sparsity": 0.9753})
    store = Store(results.parent / "masked")
    store.publish(found.model_copy(update={"measured": measured}))
    assert "97.53 %" in invoke("show", "digits/resnet8", "--results", store.folder).stdout


def test_show_says_what_is_refused_and_what_is_not_official(results):
    path = Store(results).path(RUNS[5])
    path.write_text(path.read_text().replace("0.9", "0.8"))
    output = invoke("show", "digits/resnet8", "--results", results)
    assert "changed after it was written" in output.stderr and "2 seeds of at least 3" in output.stdout


def test_show_compares_with_the_controls_that_are_asked_for(results):
    def columns(*against):
        lines = invoke("show", "digits/resnet8", "--results", results, *against).stdout.split("\n")
        headings = max((line.split() for line in lines if line.startswith("arm ")), key=len)
        return headings[headings.index("speedup") + 1 :]

    assert columns() == ["random", "scratch-e"]
    assert columns("--against", "scratch") == ["scratch-e", "scratch-b"]
    assert columns("--against", "bottleneck-e,scratch,scratch-e") == ["bottleneck-e", "scratch-e", "scratch-b"]
    text = invoke("show", "digits/resnet8", "--results", results, "--against", "bottleneck-e").stdout
    assert "+1.00 ▲" in next(line for line in text.split("\n") if line.startswith("taylor "))
    with pytest.raises(UnknownName, match=r"control .* 'scrath'.*Did you mean 'scratch'\? Known: .*random, scratch,"):
        invoke("show", "digits/resnet8", "--results", results, "--against", "random,scrath")


def test_show_has_the_columns_in_which_something_stands_and_whole_names(results):
    long = "a-variant-of-taylor-with-a-long-name+shuffled"
    for seed in range(3):
        run = next(r for r in RUNS if r.arm == "taylor" and r.seed == seed)
        Store(results).publish(make_record(run.model_copy(update={"arm": long})))
    lines = invoke("show", "digits/resnet8", "--results", results).stdout.split("\n")
    assert any(line.startswith(long) for line in lines)
    dense = next(i for i, line in enumerate(lines) if line.startswith("dense"))
    assert "rank" not in lines[dense - 1] and "random" not in lines[dense - 1]


def test_a_run_builds_the_pages_on_demand(results, tmp_path):
    Store(results).publish(make_record(RUNS[-1]))
    where = ("--results", results, "--scratch", tmp_path / "scratch")
    result = invoke("run", "digits/resnet8", *where, "--build", tmp_path / "site")
    page = (tmp_path / "site" / "benchmarks" / "digits-resnet8.html").read_text()
    assert "secateur bench run digits/resnet8 --methods taylor" in page
    assert f"Wrote {tmp_path / 'site' / 'index.html'}" in " ".join(result.stderr.split())
    invoke("run", "digits/resnet8", *where, "--build", tmp_path / "two", "--json")
    assert (tmp_path / "two" / "index.html").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRecipe, match="is a file, or cannot be written to"):
        invoke("run", "digits/resnet8", *where, "--build", tmp_path / "file")


@pytest.mark.slow
def test_a_real_run_in_processes_of_its_own(tmp_path):
    where = ("--results", tmp_path / "results", "--scratch", tmp_path / "scratch")
    narrow = ("--methods", "magnitude", "--budgets", "sparsity=0.9", "--seeds", "0", "--keep-networks")
    result = invoke("run", TINY, *where, *narrow)
    assert result.exit_code == 0 and "[2/2] magnitude weight sparsity=0.9 seed 0" in result.stderr
    records, refused = Store(tmp_path / "results").read()
    assert [r.status for r in records] == ["ok", "ok"] and refused == []
    assert (tmp_path / "scratch" / "networks" / f"{records[1].id}.safetensors").is_file()


def test_bad_words_are_one_line(tmp_path):
    with pytest.raises(UnknownName, match="digits/resnet8"):
        invoke("run", "digits/resnet9")
    with pytest.raises(InvalidRecipe, match="is not a seed"):
        invoke("run", "digits/resnet8", "--seeds", "zero")
    with pytest.raises(UnknownName, match="executor"):
        invoke("run", TINY, "--executor", "cloud", "--results", tmp_path, "--scratch", tmp_path)
    assert invoke("run", "digits/resnet8", "--again", "maybe").exit_code == 2


def test_show_without_records_says_how_to_make_them(tmp_path):
    result = CliRunner().invoke(app, ["bench", "show", "digits/resnet8", "--results", str(tmp_path / "none")])
    assert isinstance(result.exception, InvalidFile) and "secateur bench run digits/resnet8" in str(result.exception)
