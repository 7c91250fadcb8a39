from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import secateur as sc
from secateur.cli import common, inspect, main
from secateur.testing.toys import NETWORKS

USER = """
import torch
from torch import nn
from secateur.testing.toys import resnet20, toy_batches

def make_model():
    torch.manual_seed(0)
    return resnet20()

def make_data():
    return toy_batches("resnet20"), toy_batches("resnet20", seed=1)

def make_inputs():
    return [x for x, _ in toy_batches("resnet20")]

def make_example():
    return torch.zeros(1, 3, 16, 16)

def needs_argument(x):
    return x

NOT_CALLABLE = 3
"""


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    (tmp_path / "user_code.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, args)])
        try:
            main.run()
            code = 0
        except SystemExit as exit:
            code = exit.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    sys.modules.pop("user_code", None)


@pytest.mark.parametrize("command", ["", "demo", "train", "prune", "inspect", "methods", "export"])
def test_every_command_has_help(cli, command):
    code, out, _ = cli(*filter(None, [command]), "--help")
    assert code == 0 and "Usage: secateur" in out


def test_the_version(cli):
    assert cli("--version") == (0, f"secateur {sc.__version__}\n", "")


def test_results_do_not_go_where_a_file_is(cli, tmp_path):
    (tmp_path / "taken").write_text("x")
    (tmp_path / "recipe.yaml").write_text("task: digits\nbudget: {macs: 0.5}\n")
    code, _, err = cli("prune", tmp_path / "recipe.yaml", "--out", tmp_path / "taken")
    assert code == 2 and "is a file, or cannot be written to" in err


def test_methods_lists_and_shows_cards(cli):
    code, out, _ = cli("methods")
    assert code == 0 and all(name in out for name in ("magnitude", "random", "taylor"))
    code, out, _ = cli("methods", "taylor")
    assert code == 0 and "Taylor importance" in out and "Deviations" in out
    assert json.loads(cli("methods", "--json")[1])[0]["name"]


def test_inspect_shows_axes_and_frozen_dims(cli):
    code, out, _ = cli("inspect", "user_code:make_model", "--shape", "1,3,16,16")
    assert code == 0 and "blocks.*.conv1" in out and "convolution kernel" in out and "Proof" in out
    data = json.loads(cli("inspect", "user_code:make_model", "--example", "user_code:make_example", "--json")[1])
    axis = next(a for a in data["axes"] if a["name"] == "fc")
    assert axis == {**axis, "prunable": False, "reason": "output"} and data["permutation_error"] < 1e-5
    assert {"tensors", "uncuttable", "ties", "branches"} <= data.keys() and axis["macs_share"] < 0.01


@pytest.fixture(scope="module")
def analyzed_vit():
    return inspect._analyzed(*inspect._model_and_inputs("digits/vit", None, None))


@pytest.fixture
def analyzed_once(monkeypatch, analyzed_vit):
    monkeypatch.setattr(inspect, "_analyzed", lambda network, inputs: analyzed_vit)


def test_inspect_folds_repeated_blocks_unless_all_are_asked_for(cli, analyzed_once):
    folded = cli("inspect", "digits/vit")[1]
    assert "blocks.*.mlp.0" in folded and "4 x 256" in folded and "residual stream" in folded
    assert "cannot be cut at all: fc.bias (10)" in folded and "indexed by a number" in folded
    every = cli("inspect", "digits/vit", "--all")[1]
    assert "blocks.3.mlp.0" in every and "indexed by a number (unbind in blocks.3.attention)" in every


@pytest.mark.parametrize("arguments", ["digits/vit", "digits/vit --why blocks.0.attention.qkv.weight"])
def test_the_readme_shows_what_inspect_prints(cli, analyzed_once, monkeypatch, arguments):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.search(rf"\$ secateur inspect {re.escape(arguments)}\n(.*?)(\.\.\.\n)?```", readme, re.DOTALL)[1]
    monkeypatch.setenv("COLUMNS", "92")
    printed = "\n".join(line.rstrip() for line in cli("inspect", *arguments.split())[1].splitlines())
    assert printed.startswith(shown.rstrip())


def test_inspect_draws_the_network(cli, analyzed_once, tmp_path):
    code, out, _ = cli("inspect", "digits/vit", "--report", "net.html")
    assert (
        code == 0
        and "Wrote net.html" in out
        and "What can be cut from digits/vit" in (tmp_path / "net.html").read_text()
    )
    code, out, err = cli("inspect", "digits/vit", "--report", "missing/net.html")
    assert code == 2 and out == "" and "missing" in err and len(err.strip().splitlines()) == 1


def test_inspect_says_why(cli, analyzed_once):
    out = cli("inspect", "digits/vit", "--why", "blocks.1.attention.qkv.weight")[1]
    assert "192 = 3! x 4 x 16" in out and "taken apart as 3 x 4 x 16 by reshape in blocks.1.attention (networks" in out
    assert "frozen: indexed by a number (unbind in blocks.1.attention)" in out
    assert "linear in blocks.1.attention.proj" in out and "blocks.1.attention.proj.weight:1" in out
    out = cli("inspect", "digits/vit", "--why", "patches")[1]
    assert "residual branches are added" in out and "blocks.*.mlp.2.weight:0 (4)" in out
    data = json.loads(cli("inspect", "digits/vit", "--why", "fc.weight", "--json")[1])
    assert data["dims"][0]["axes"][0] == {**data["dims"][0]["axes"][0], "prunable": False, "reasons": ["output"]}
    assert {"tensor": "norm.bias", "dim": 0}.items() <= data["dims"][1]["axes"][0]["shared"][-1].items()
    assert json.loads(cli("inspect", "digits/vit", "--why", "patches", "--json")[1])["begins"] == ["positions", 2]


@pytest.fixture
def fake_timm(monkeypatch):
    timm = ModuleType("timm")
    timm.list_models, timm.is_model = lambda: ["tiny"], lambda name: name == "tiny"

    def create_model(name, pretrained):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        model.pretrained_cfg = {"input_size": (3, 4, 4)}
        return model

    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)


def test_networks_of_libraries_bring_their_inputs(cli, tmp_path, fake_timm):
    assert "416 MACs for an input of 1x3x4x4" in cli("inspect", "timm:tiny")[1]
    assert "832 MACs for an input of 2x3x4x4" in cli("inspect", "timm:tiny", "--shape", "2,3,4,4")[1]
    content = {"model": "timm:tiny", "budget": {"macs": 0.5}, "recipe": {"granularity": "channel"}}
    code, _, err = cli("prune", recipe(tmp_path, **content), "--out", "small")
    assert code == 0, err
    code, _, err = cli("export", "small/model.safetensors", "--build", "timm:tiny", "--format", "pt2")
    assert code == 0 and (tmp_path / "small" / "model.pt2").exists(), err
    code, out, err = cli("inspect", "timm:tinny")
    assert code == 2 and out == "" and "Unknown timm network 'tinny'. Did you mean 'tiny'?" in err


def recipe(tmp_path, **content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


OWN = {
    "model": "user_code:make_model",
    "data": "user_code:make_data",
    "example": [1, 3, 16, 16],
    "method": "taylor",
    "budget": {"macs": 0.5},
    "recipe": {"granularity": "channel", "recovery": {"name": "fine-tune", "epochs": 1}},
}


def test_prune_a_users_own_network_and_export_it(cli, tmp_path):
    code, out, err = cli("prune", recipe(tmp_path, **OWN), "--out", "small")
    assert code == 0, err
    assert {p.name for p in (tmp_path / "small").iterdir()} == {"model.safetensors", "record.json", "report.html"}
    record = json.loads((tmp_path / "small" / "record.json").read_text())
    assert record["after"]["macs"] <= record["before"]["macs"] / 2 and record["history"][-1]["validation"] >= 0
    assert "MACs" in out

    for format in ("onnx", "pt2"):
        code, out, err = cli(
            "export", "small/model.safetensors", "--build", "user_code:make_model", "--shape", "1,3,16,16",
            "--format", format, "--json",
        )  # fmt: skip
        assert code == 0, err
        assert json.loads(out)["format"] == format and (tmp_path / "small" / f"model.{format}").exists()


def test_distillation_by_several_teachers_from_inputs_alone(cli, tmp_path):
    taught = {"granularity": "channel", "recovery": {"name": "distill", "alpha": 1, "features": 0.1, "epochs": 1}}
    content = {**OWN, "method": "magnitude", "data": "user_code:make_inputs", "recipe": taught}
    path = recipe(tmp_path, **content, teachers=["user_code:make_model"])
    code, out, err = cli("prune", path, "--json", "--out", "o")
    assert code == 0, err
    record = json.loads(out)
    assert record["recipe"]["recovery"]["features"] == 0.1 and record["run"]["teachers"] == ["user_code:make_model"]
    plain = {**taught, "recovery": "fine-tune"}
    code, _, err = cli("prune", recipe(tmp_path, **{**content, "recipe": plain}, teachers=["user_code:make_model"]))
    assert code == 2 and "'fine-tune' learns from none: take 'distill'" in err
    code, _, err = cli("prune", recipe(tmp_path, **{**content, "recipe": plain}))
    assert code == 2 and "needs targets, and these batches have none" in err


def test_options_override_the_file_and_json_is_json(cli, tmp_path):
    other = {**OWN, "model": "user_code:nothing", "method": "random", "recipe": {"granularity": "channel"}}
    code, out, _ = cli(
        "prune", recipe(tmp_path, **other), "--model", "user_code:make_model", "--seed", 7, "--json", "--out", "o"
    )
    assert code == 0 and json.loads(out)["seed"] == 7


def test_prune_a_task(cli, tmp_path):
    content = {"task": "digits", "network": "vit", "method": "magnitude", "budget": {"sparsity": 0.5}}
    code, out, err = cli("prune", recipe(tmp_path, **content), "--out", "o")
    assert code == 0, err
    assert "accuracy" in out and "non-zero" in out


def test_a_recipe_that_names_the_initial_weights_gets_those_of_the_reference(cli, tmp_path):
    from secateur.tasks.digits import TASK

    content = {"task": "digits", "network": "resnet8", "method": "snip", "budget": {"sparsity": 0.5}}
    code, _, err = cli("prune", recipe(tmp_path, **content), "--out", "o")
    assert code == 0, err
    found = sc.load(tmp_path / "o" / "model.safetensors", lambda: TASK.build("resnet8"))
    torch.manual_seed(0)  # the seed of the packaged reference
    initial = TASK.build("resnet8")
    for ours, theirs in zip(found.parameters(), initial.parameters(), strict=True):
        assert torch.equal(ours, theirs * (ours != 0))


def test_train_writes_weights_and_record(cli, tmp_path):
    code, out, err = cli("train", "digits", "--network", "vit", "--epochs", "1", "--out", "v.safetensors")
    assert code == 0, err
    assert "test accuracy" in out and json.loads((tmp_path / "v.json").read_text())["training"]["epochs"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("methods", "taylr"), "Unknown method 'taylr'. Did you mean 'taylor'?"),
        (("demo", "--task", "imagenet"), "Unknown task 'imagenet'"),
        (("train", "digits", "--network", "alexnet"), "Unknown network of task 'digits' 'alexnet'"),
        (("train", "digits", "--lr", "-1"), "lr: Input should be greater than 0"),
        (("inspect", "nowhere:f", "--shape", "1,2"), "Cannot import the module of 'nowhere:f'"),
        (("inspect", "user_code:g", "--shape", "1,2"), "has no 'g'"),
        (("inspect", "user_code", "--shape", "1,2"), "neither module:function nor TASK/NETWORK"),
        (("inspect", "/nowhere/net.safetensors"), "neither module:function nor TASK/NETWORK"),
        (("inspect", "user_code:make_model"), "either --shape, or --example"),
        (("inspect", "user_code:make_model", "--example", "user_code:no"), "has no 'no'"),
        (("inspect", "digits/vit", "--why", "fc.weigth"), "Did you mean 'fc.weight'?"),
        (("inspect", "digits/vit", "--shape", "1,1,24,24"), "has inputs of its own"),
        (("inspect", "user_code:make_model", "--shape", "1,x"), "is not a shape"),
        (("inspect", "user_code:make_model", "--shape", "0,3"), "at least 1"),
        (("inspect", "user_code:make_model", "--shape", "1,5,16,16"), "does not run on the example inputs"),
        (("inspect", "user_code:needs_argument", "--shape", "1,2"), "when called without arguments"),
        (("inspect", "user_code:NOT_CALLABLE", "--shape", "1,2"), "is not a function"),
        (("prune", "missing.yaml"), "Cannot read missing.yaml"),
        (("export", "missing.safetensors", "--build", "user_code:make_model", "--shape", "1,2"), "There is no file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(cli, args, message):
    code, out, err = cli(*args)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {"macs": 2}}, "budget.*macs: Input should be less than 1"),
        ({"budget": {}}, "exactly one of params, macs"),
        ({"budgett": {}}, "budgett: Extra inputs are not permitted"),
        ({"method": "tailor"}, "Unknown method 'tailor'"),
        ({"recipe": {"granularty": "channel"}}, "recipe has no slot 'granularty'"),
        ({"recipe": {"granularity": "channel", "schedule": {"name": "iterative", "steps": 0}}}, "steps"),
        ({"model": None}, "either a task, or a model"),
        ({"task": "digits"}, "either a task, or a model"),
        ({"example": None}, "needs example"),
        ({"budget": {"macs": 0.001}}, "cannot be met: the smallest network"),
        ({"data": None}, "pass data="),
    ],
)
def test_bad_recipes_are_one_line(cli, tmp_path, change, message):
    content = {key: value for key, value in {**OWN, **change}.items() if value is not None}
    code, _, err = cli("prune", recipe(tmp_path, **content))
    assert code == 2 and re.search(message, err) and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "pruned").exists()


def test_a_recipe_file_must_be_yaml_with_keys(cli, tmp_path):
    (tmp_path / "r.yaml").write_text("[1, 2")
    assert "is not YAML" in cli("prune", "r.yaml")[2]
    (tmp_path / "r.yaml").write_text("- a\n- b")
    assert "must hold keys and values" in cli("prune", "r.yaml")[2]


def test_shapes_are_written_with_commas_or_crosses():
    assert common.parse_shape("1,3,8,8") == common.parse_shape("1x3x8x8") == (1, 3, 8, 8)
    assert torch.zeros(common.parse_shape("2")).shape == (2,) and NETWORKS
