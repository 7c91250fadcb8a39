from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from secateur.cli.main import app
from secateur.errors import DataNeeded

NETWORKS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

def data():
    batches = [(torch.randn(32, 8), torch.randint(4, (32,)))]
    return batches, batches

def training():
    return data()[0]
"""


def invoke(*words):
    result = CliRunner().invoke(app, ["compare", *map(str, words)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compared_nets.py").write_text(NETWORKS)
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: compared_nets:net\ndata: compared_nets:data\nexample: [1, 8]\nbudget: {macs: 0.5}\n"
        "recipe: {granularity: channel, recovery: {name: fine-tune, epochs: 2}}\n"
    )
    return path


def test_a_comparison_writes_network_figures_and_report(recipe, tmp_path):
    result = invoke(recipe, "--methods", "magnitude", "--seeds", "2", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "random" in result.stdout and "the dense network has" in result.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "comparison.json", "report.html"}
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert all(list(m["values"]) == ["0", "1"] for m in content["methods"])
    assert content["methods"][0]["about"]["recipe"]["recovery"]["epochs"] == 2
    assert content["methods"][0]["latency"]["engine"] == "eager"
    words = ("--methods", "magnitude", "--seeds", "1", "--engine", "onnxruntime", "--json")
    again = json.loads(invoke(recipe, *words).stdout)
    assert again["methods"][0]["latency"]["engine"] == "onnxruntime"
    assert "One seed decides nothing" in again["recommendation"] and torch.get_num_threads() == 1


def test_without_validation_data_it_says_what_to_do(recipe):
    recipe.write_text(recipe.read_text().replace("compared_nets:data", "compared_nets:training"))
    with pytest.raises(DataNeeded, match=r"return \(training, validation\)"):
        invoke(recipe)
