from __future__ import annotations

import json

import pytest

from secateur.bench import demo
from secateur.bench.demo_report import demo_page, headline_of, table_of
from secateur.parts.recovery.fine_tune import FineTune


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """The demo in small: one process after the other, two seeds, one epoch each."""
    from secateur.measure import latency

    out = tmp_path_factory.mktemp("demo")
    settings = demo.Settings(
        slots={**demo.SETTINGS["digits"].slots, "recovery": {"name": "fine-tune", "epochs": 0.2, "lr": 0.02}},
        other_budgets=(0.6,),
        scratch=FineTune(epochs=0.2, lr=0.05),
    )
    patch = pytest.MonkeyPatch()
    patch.setitem(demo.SETTINGS, "digits", settings)
    patch.setattr(latency, "TIMED_SECONDS", 0.05)
    patch.setattr(latency, "WARM_UP_SECONDS", 0.02)
    patch.setattr(demo, "ProcessPoolExecutor", _InThisProcess)
    progress = []
    found = demo.run_demo("digits", out, 2, lambda *a: progress.append(a))
    patch.undo()
    assert progress[-1][1] == progress[-1][2]
    return out, found


class _InThisProcess:
    """A process pool that runs jobs here and now, so that the patched settings hold."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        future.set_result(function(*args))
        return future


def test_the_demo_measures_every_row_and_writes_every_file(record):
    out, found = record
    assert json.loads((out / "record.json").read_text()) == json.loads(json.dumps(found))
    assert {p.name for p in out.iterdir()} == {"record.json", "taylor.safetensors", "taylor.onnx", "runs"}
    assert list(found["rows"]) == ["dense", "taylor", "random", "scratch"]
    for name, row in found["rows"].items():
        assert row["latency"]["eager"]["n"] >= 20 and row["latency"]["onnxruntime"]["p50_ms"] > 0
        assert row["test_accuracy"]["n"] == (1 if name == "dense" else 2) and row["file_bytes"] > 10_000
    dense = found["rows"]["dense"]["profile"]
    assert all(0.2 < found["rows"][n]["profile"]["macs"] / dense["macs"] <= 0.3 for n in ("taylor", "random"))
    assert found["rows"]["scratch"]["profile"] == found["rows"]["taylor"]["profile"]
    recipes = found["recipes"]
    assert recipes["taylor"]["recovery"] == recipes["random"]["recovery"]
    assert len(found["runs"]) == 8


def test_the_table_and_the_page_show_the_record(record):
    _, found = record
    table = table_of(found)
    assert table.head[:4] == ["network", "test accuracy", "params", "MACs"] and len(table.rows) == 4
    assert table.rows[0][1] == f"{100 * found['rows']['dense']['test_accuracy']['mean']:.2f} %"
    assert "±" in table.rows[1][1] and headline_of(found) in demo_page(found).html()
    html = demo_page(found).html()
    for text in ("Accuracy against cost", "Kept width per layer", "Recovery", "convolution kernel", "blocks.2.conv1"):
        assert text in html
