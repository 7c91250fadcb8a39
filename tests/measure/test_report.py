from __future__ import annotations

import re

import pytest

import secateur as sc
from secateur.measure.figures import Point, tradeoff_figure, training_figure, widths_figure
from secateur.measure.report import Page, Section, Table, Tile, change, count, frozen_table, machine_line, short_reason
from secateur.testing.toys import toy, toy_batches


def without_scripts(html):
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


def test_numbers_for_people():
    assert [count(n) for n in (48_530_688, 308_074, 512, 4.1e9)] == ["48.5 M", "308 k", "512", "4.1 G"]
    assert change(200, 60) == "\N{MINUS SIGN}70 %" and change(100, 103) == "+3 %"
    assert short_reason("convolution kernel (conv2d in a.b); output") == "convolution kernel"


def test_frozen_axes_are_grouped_by_reason():
    table = frozen_table({f"c{i}:2": f"convolution kernel (conv2d in c{i})" for i in range(5)} | {"fc": "output"})
    assert table.rows == [("convolution kernel", "5", "c0:2, c1:2, c2:2 and 2 more"), ("output", "1", "fc")]


def test_the_page_works_offline_and_escapes_what_it_shows(tmp_path):
    page = Page(
        "t", "<b>head</b>", "sub", [Tile("1", "one")],
        [
            Section("Table", table=Table(("a", "b"), [("<i>", "2")])),
            Section("Plot", figure=widths_figure({"x": 4}, {"x": 1})),
        ],
    )  # fmt: skip
    page.write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    body = without_scripts(html)
    assert "&lt;b&gt;head" in body and "&lt;i&gt;" in body and "Plotly.newPlot" in html
    assert not re.search(r'(src|href)="http', body) and not re.search(r"<script[^>]+src=", html)
    assert "prefers-color-scheme: dark" in html and "1 of 4" in html


def test_figures_hold_their_numbers():
    plot = tradeoff_figure({"taylor": [Point(10, 98.5, 0.2), Point(5, 97)]}, "MACs", "accuracy", Point(20, 99))
    assert '"x":[5,10]' in plot and '"array":[0.0,0.2]' in plot and "accuracy" in plot
    history = [
        {"step": 5, "train_loss": 0.5, "lr": 0.1},
        {"step": 10, "train_loss": 0.25, "lr": 0.0, "validation": 0.9},
    ]
    plot = training_figure({"seed 0": history})
    assert '"y":[0.5,0.25]' in plot and '"y":[90.0]' in plot and "validation accuracy" in plot
    assert "validation accuracy" not in training_figure({"seed 0": history[:1]})


def test_the_machine_line_names_versions():
    assert re.search(r"torch 2\.\d+", machine_line()) and "cores" in machine_line()


@pytest.mark.parametrize("granularity", ["channel", "weight"])
def test_the_report_of_a_run(tmp_path, granularity):
    model, x = toy("resnet20")
    data = toy_batches("resnet20")
    result = sc.prune(
        model, x, method="magnitude", granularity=granularity, budget=sc.Budget(macs=0.5), data=data,
        validation=data, recovery={"name": "fine-tune", "epochs": 1},
    )  # fmt: skip
    html = result.report(tmp_path / "report.html")
    body = without_scripts(html)
    assert (tmp_path / "report.html").read_text() == html
    assert f"{result.before.macs:,}" in body and f"{result.after.effective_macs:,}" in body and "Recovery" in body
    if granularity == "channel":
        assert "Kept width per layer" in body and "convolution kernel" in body and "blocks.8.conv1" in html
    else:
        assert "of the weights are zero" in body and "Kept width" not in body
