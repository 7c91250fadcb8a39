from __future__ import annotations

import pytest
import yaml

import secateur as sc
from secateur.bench.benchmarks import benchmark_names, budget_label, find_benchmark, parse_budget, read_benchmark
from secateur.bench.plan import plan
from secateur.core.recipe import FreshAtLast, Recipe
from secateur.errors import InvalidRecipe, UnknownName
from secateur.tasks import find_task


def test_every_benchmark_is_valid_and_of_the_data_that_its_task_has():
    assert {"digits/resnet8", "fashion-mnist/resnet8", "fashion-mnist/resnet20", "fashion-mnist/vit"} <= set(
        benchmark_names()
    )
    for name in benchmark_names():
        benchmark = find_benchmark(name)
        assert benchmark.name == name and benchmark.official.seeds >= 3 and len(benchmark.seeds) >= 3
        if benchmark.task.data is not None:
            task = find_task(benchmark.task.name)
            assert (task.version, task.digest) == (benchmark.task.version, benchmark.task.data)
            assert benchmark.network in task.networks


def test_every_figure_of_a_paper_stands_beside_a_run_that_is_planned():
    figures = [(name, r.method, r.budget, r.value) for name in benchmark_names() for r in find_benchmark(name).reported]
    assert figures == [
        ("imagefolder/resnet50", "rigl", {"sparsity": sparsity}, value)
        for sparsity, value in ((0.8, 0.7512), (0.9, 0.7307), (0.95, 0.7039))
    ]
    benchmark = find_benchmark("imagefolder/resnet50")
    runs = plan(benchmark, "0" * 16, ["rigl"])
    for figure in benchmark.reported:
        assert {run.seed for run in runs if figure.is_about(run)} == set(benchmark.seeds) and "arXiv" in figure.source


def write(folder, changes):
    content = yaml.safe_load(find_file().read_text())
    path = folder / "b.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


def find_file():
    from secateur.bench.benchmarks import benchmark_folders

    return benchmark_folders()[1] / "digits" / "resnet8.yaml"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, r"b\.yaml: Benchmark: sedes: Extra inputs are not permitted"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"version": 0}, "version: Input should be greater"),
        ({"metric": "beauty"}, "metric: Input should be 'accuracy'"),
        ({"ladders": [{"granularity": "chanel", "budgets": [{"macs": 0.5}], "recovery": "none"}]}, "'channel'"),
        ({"ladders": [{"granularity": "channel", "budgets": [{"macs": 5}], "recovery": "none"}]}, "less than 1"),
    ],
)
def test_a_wrong_benchmark_is_one_clear_line(tmp_path, changes, message):
    with pytest.raises((InvalidRecipe, UnknownName), match=message):
        read_benchmark(write(tmp_path, changes))


def test_files_that_are_no_benchmark_say_so(tmp_path):
    path = tmp_path / "x.yaml"
    for text, message in (("- a", "must hold keys"), ("a: [", "not YAML")):
        path.write_text(text)
        with pytest.raises(InvalidRecipe, match=message):
            find_benchmark(str(path))
    with pytest.raises(InvalidRecipe, match="No such file"):
        find_benchmark(str(tmp_path / "none.yaml"))
    with pytest.raises(UnknownName, match="Did you mean 'digits/resnet8'"):
        find_benchmark("digits/resnet")


def granularities_of(benchmark, arm):
    control = benchmark.controls.get(arm)
    if arm == "dense" or (control and control.granularities):
        return control.granularities if control else ()
    return sc.method(control.method if control else arm).card.granularity


def test_a_plan_has_every_arm_at_every_budget_with_the_same_recovery():
    benchmark = find_benchmark("digits/resnet8")
    runs = plan(benchmark, "0" * 16)
    assert [run.role for run in runs[:3]] == ["dense"] * 3 and {run.seed for run in runs} == {0, 1, 2}
    arms = {run.arm for run in runs}
    assert {"dense", "random", "scratch-e", "scratch-b", "bottleneck-e", "taylor", "magnitude"} <= arms
    for ladder in benchmark.ladders:
        name = ladder.granularity.name
        for arm in arms:
            found = [r for r in runs if r.arm == arm and r.granularity == name]
            if name not in granularities_of(benchmark, arm):
                assert not found
                continue
            assert sorted({(r.budget_label, r.seed) for r in found}) == sorted(
                (budget_label(b), s) for b in ladder.budgets for s in benchmark.seeds
            )
            recipe = Recipe(**found[0].recipe)
            assert recipe.hash == found[0].recipe_hash and recipe.granularity == ladder.granularity
            if not recipe.from_scratch:
                assert recipe.recovery == ladder.recovery
            else:
                assert recipe.recovery.epochs == benchmark.training.epochs
                assert recipe.recovery.compute == ("dense epochs" if arm == "scratch-b" else "epochs")
    assert {r.role for r in runs if r.arm in benchmark.controls} == {"control"}
    assert not any(r.arm == "scratch-b" and r.granularity == "weight" for r in runs)


def test_a_plan_can_be_narrowed_and_refuses_what_the_benchmark_lacks():
    benchmark = find_benchmark("digits/resnet8")
    runs = plan(benchmark, "0" * 16, ["taylor"], [parse_budget("macs=0.5")], [4])
    assert [run.label for run in runs] == ["dense seed 4", "taylor channel macs=0.5 seed 4"]
    with pytest.raises(UnknownName, match="Did you mean 'taylor'"):
        plan(benchmark, "0" * 16, ["tailor"])
    with pytest.raises(UnknownName, match=r"macs=0\.5"):
        plan(benchmark, "0" * 16, budgets=[parse_budget("macs=0.4")])
    for text in ("macs", "macs=much", "speed=2", "macs=2"):
        with pytest.raises(InvalidRecipe):
            parse_budget(text)


def test_a_ladder_may_say_which_tensors_are_pruned(tmp_path):
    plain = find_benchmark("digits/resnet8")
    ladder = {"granularity": "weight", "budgets": [{"sparsity": 0.9}], "recovery": "none"}
    narrow = read_benchmark(write(tmp_path, {"ladders": [{**ladder, "scope": {"include": ["blocks.*"]}}]}))
    (run,) = plan(narrow, "0" * 16, methods=["magnitude"], seeds=[0])[1:]
    assert Recipe(**run.recipe).scope.include == ("blocks.*",)
    (run,) = plan(plain, "0" * 16, methods=["magnitude"], budgets=[sc.Budget(sparsity=0.9)], seeds=[0])[1:]
    assert Recipe(**run.recipe).scope.include == ("*",)


def test_a_variant_under_the_name_of_its_method_takes_its_place(tmp_path):
    slots = {"schedule": {"name": "iterative", "steps": 2, "whole": True}}
    benchmark = read_benchmark(write(tmp_path, {"variants": {"lottery": {"method": "lottery", "slots": slots}}}))
    assert benchmark.methods().count("lottery") == 1 and "magnitude" in benchmark.methods()
    with pytest.raises(InvalidRecipe, match="'taylor' of 'magnitude' has the name of another method"):
        read_benchmark(write(tmp_path, {"variants": {"taylor": {"method": "magnitude"}}}))
    runs = plan(benchmark, "0" * 16, ["lottery"], seeds=[0])[1:]
    assert runs and all(run.method == "lottery" and run.recipe["schedule"]["steps"] == 2 for run in runs)


def test_variants_are_methods_with_other_answers_and_only_some_methods_take_part(tmp_path):
    variants = {"force": {"method": "snip", "slots": {"criterion": {"name": "snip", "force": 3}}}}
    benchmark = read_benchmark(write(tmp_path, {"variants": variants, "only": ["magnitude", "snip"]}))
    runs = [run for run in plan(benchmark, "0" * 16, seeds=[0]) if run.role == "method"]
    assert {run.arm for run in runs} == {"magnitude", "snip", "force"}
    assert {(run.method, run.granularity) for run in runs if run.arm == "force"} == {("snip", "weight")}
    force = next(Recipe(**run.recipe) for run in runs if run.arm == "force")
    snip = next(Recipe(**run.recipe) for run in runs if run.arm == "snip")
    assert force.criterion.force == 3 and force.but(criterion=snip.criterion) == snip
    for wrong in ({"only": ["snipp"]}, {"variants": {"force": {"method": "snipp"}}}):
        with pytest.raises(UnknownName, match="snipp"):
            plan(read_benchmark(write(tmp_path, wrong)), "0" * 16)


def test_sanity_checks_of_a_method_are_controls_with_its_own_mask(tmp_path):
    content = yaml.safe_load(find_file().read_text())
    content["ladders"][1]["sanity"] = [content["ladders"][1]["budgets"][-1]]
    benchmark = read_benchmark(write(tmp_path, {"ladders": content["ladders"]}))
    runs = plan(benchmark, "0" * 16, seeds=[0])
    labels = {run.label for run in runs}
    budget = budget_label(benchmark.ladders[1].budgets[-1])
    assert {f"snip+shuffled weight {budget} seed 0", f"snip+fresh weight {budget} seed 0"} <= labels
    checks = [run for run in runs if "+" in run.arm]
    assert {run.budget_label for run in checks} == {budget} and not any(r.arm.startswith("random+") for r in checks)
    assert {run.role for run in checks} == {"control"} and {run.granularity for run in checks} == {"weight"}
    found = {run.arm: Recipe(**run.recipe) for run in checks}
    plain = {run.arm: Recipe(**run.recipe) for run in runs if run.recipe and run.granularity == "weight"}
    for name in ("snip", "magnitude"):
        shuffled, fresh = found[f"{name}+shuffled"], found[f"{name}+fresh"]
        assert shuffled.but(allocation=plain[name].allocation) == plain[name]
        assert shuffled.allocation.of == plain[name].allocation
        assert fresh.weights_from == "fresh" and fresh.recovery.epochs == benchmark.training.epochs
        assert fresh.but(weights_from=plain[name].weights_from, recovery=plain[name].recovery) == plain[name]
    tickets = plan(find_benchmark("fashion-mnist/resnet8-from-init"), "0" * 16, ["lottery-4-rounds+fresh"], seeds=[0])
    assert Recipe(**tickets[-1].recipe).weights_from == FreshAtLast(earlier="init")  # the ticket's own mask
    content["variants"] = {"rounds": {"method": "magnitude", "slots": {"schedule": {"name": "iterative", "span": 0}}}}
    rounds = plan(read_benchmark(write(tmp_path, content)), "0" * 16, ["rounds+fresh"], seeds=[0])
    assert Recipe(**rounds[-1].recipe).weights_from == FreshAtLast(earlier="same")  # each cut scores what the last left
    asked = plan(find_benchmark("digits/resnet8"), "0" * 16, ["magnitude+fresh"], [parse_budget("sparsity=0.9")], [0])
    assert [run.label for run in asked] == ["dense seed 0", "magnitude+fresh weight sparsity=0.9 seed 0"]
    with pytest.raises(InvalidRecipe, match="sanity must name budgets"):
        content["ladders"][1]["sanity"] = [{"sparsity": 0.123}]
        read_benchmark(write(tmp_path, {"ladders": content["ladders"]}))
