from __future__ import annotations

import time

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import InvalidInputs, MissingDependency, UnknownName
from secateur.measure import latency as module
from secateur.measure.latency import available_engines, compare_latency
from secateur.testing.toys import toy


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(module, "WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(module, "TIMED_SECONDS", 0.02)


class Sleep(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        type(self).batches = []  # attributes of the instance are restored after each measurement
        self.p = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.batches.append(x.shape[0])
        time.sleep(self.seconds)
        return x


def test_the_median_is_the_time_of_a_call():
    model = Sleep(0.004).train()
    found = sc.measure_latency(model, torch.zeros(2, 3), threads=1, batch=5)
    assert 4 <= found.p50_ms < 8 and found.p50_ms <= found.p90_ms
    assert (found.engine, found.threads, found.batch, found.dtype) == ("eager", 1, 5, "float32")
    assert model.training and set(model.batches) == {5}
    assert len(model.batches) > found.n >= 20  # warm-up calls are not counted


@pytest.mark.parametrize("name", ["threads", "batch"])
def test_fewer_than_one_thread_or_sample_is_refused(name):
    with pytest.raises(InvalidInputs, match=f"{name} must be at least 1; got 0"):
        sc.measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), **{name: 0})


def test_models_are_timed_in_turn():
    order = []

    class Logging(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name, self.p = name, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            order.append(self.name)
            return x

    compare_latency({"a": Logging("a"), "b": Logging("b")}, torch.zeros(1, 1))
    assert order[:6] == ["a", "b"] * 3


def test_threads_are_restored():
    before = torch.get_num_threads()
    sc.measure_latency(Sleep(0), torch.zeros(1, 1), threads=2)
    assert torch.get_num_threads() == before


def test_onnxruntime_runs_the_same_network():
    model, x = toy("squeeze_excite")
    found = sc.measure_latency(model, x, engine="onnxruntime", threads=1)
    assert found.engine == "onnxruntime" and found.p50_ms > 0 and "onnxruntime" in available_engines()


def test_unknown_and_missing_engines(monkeypatch):
    with pytest.raises(UnknownName, match="Unknown engine 'tensorrt'.*eager"):
        sc.measure_latency(Sleep(0), torch.zeros(1, 1), engine="tensorrt")
    import secateur.optional

    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(secateur.optional.importlib, "import_module", missing)
    with pytest.raises(MissingDependency, match=r"pip install 'secateur\[openvino\]'"):
        sc.measure_latency(Sleep(0), torch.zeros(1, 1), engine="openvino")
