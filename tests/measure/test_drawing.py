from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.measure.drawing import TIMES, Run, drawing_data, drawing_page, repeats
from secateur.testing.toys import toy


@pytest.fixture(scope="module")
def vit():
    return sc.trace(*toy("vit"))


def text(shape):
    return ", ".join(" ".join(word for word, _ in dim) for dim in shape)


def test_layers_stand_in_the_order_of_execution_with_the_sizes_of_their_kernels(vit):
    rows = drawing_data(vit)["rows"]
    assert [row["name"] for row in rows[:5]] == [
        "patches", "positions", "blocks.0.norm1", "blocks.0.attention.qkv", "blocks.0.attention.proj",
    ]  # fmt: skip
    assert rows[-1]["name"] == "fc" and len(rows) == 2 + 2 * 6 + 2
    shapes = {row["name"]: text(row["shape"]) for row in rows}
    assert shapes["blocks.0.attention.qkv"] == f"3 {TIMES} 3 {TIMES} 8, 24"
    assert shapes["blocks.0.attention.proj"] == f"24, 3 {TIMES} 8"
    assert sum(row["params"] for row in rows) == vit.params({})


def test_marks_say_who_writes_and_who_reads_an_axis(vit):
    data = drawing_data(vit)
    hidden = next(i for i, axis in enumerate(data["axes"]) if axis["name"] == "blocks.0.mlp.0")
    stream = next(i for i, axis in enumerate(data["axes"]) if axis["role"] == "residual stream")
    marks = {row["name"]: row["marks"] for row in data["rows"]}
    assert marks["blocks.0.mlp.0"] == {hidden: "writes", stream: "reads"}
    assert marks["blocks.0.mlp.2"] == {stream: "writes", hidden: "reads"}
    assert marks["blocks.0.norm1"] == {stream: "holds"}
    assert sum(hidden in row for row in marks.values()) == 2
    axis = data["axes"][hidden]
    assert axis["reasons"] == [] and axis["members"][0] == ["blocks.0.mlp.0.weight", 0, ""]
    assert axis["members"][-1] == ["blocks.0.mlp.2.weight", 1, "linear in blocks.0.mlp.2"]


def test_repeated_blocks_are_found_and_named_once(vit):
    (run,) = drawing_data(vit)["repeats"]
    assert (run["start"], run["period"], run["times"]) == (2, 6, 2)
    assert run["names"][0] == "blocks.*.norm1" and run["names"][-1] == "blocks.*.mlp.2"


def test_runs_cover_as_much_as_possible():
    assert repeats("xababaz", "xababaz") == [Run(1, 2, 2)]  # ab ab, then a and z
    assert repeats("aabaab", "aabaab") == [Run(0, 3, 2)]  # rather than a a
    assert repeats("abc", "abc") == [] and repeats("", "") == []


def test_runs_begin_where_blocks_begin():
    names = ["0.out", "1.in", "1.out", "2.in", "2.out", "3.in"]
    assert repeats([name[2:] for name in names], names) == [Run(1, 2, 2)]
    plain = ["out", "in", "out", "in", "out", "in"]  # nothing says where
    assert repeats(plain, plain) == [Run(0, 2, 3)]


def test_parameters_that_nothing_used_come_last():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.spare, self.used = nn.Linear(3, 2), nn.Linear(3, 4)

        def forward(self, x):
            return self.used(x)

    rows = drawing_data(sc.trace(Spare(), torch.zeros(1, 3)))["rows"]
    assert [row["name"] for row in rows] == ["used", "spare"]


def test_the_page_works_offline_and_holds_the_data(tmp_path, vit):
    drawing_page(vit, "<my> net", 1e-7).write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "&lt;my&gt; net" in html and "axes that can be cut" in html
    assert not re.search(r'(src|href)="http', html) and "Plotly" not in html and len(html) < 100_000
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[1])
    assert data["net"]["rows"][0]["name"] == "patches" and data["roles"]["head"]
    assert "It was not proved" in drawing_page(vit, "net", None).html()
