"""Timing models in real engines.

A time means nothing without its engine, threads, batch and type, so a `Latency` carries them. Models that are
compared are timed in turn, call by call, so that a machine that slows down slows them all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn

from secateur.deploy import onnx
from secateur.errors import InvalidInputs, UnknownName
from secateur.optional import optional_import
from secateur.structure.inputs import Inputs, as_inputs, undisturbed, with_batch

Call = Callable[[], object]

WARM_UP_SECONDS = 0.2
TIMED_SECONDS = 1.0
CALLS = (20, 400)
"""Fewest and most timed calls of each model."""


@dataclass(frozen=True)
class Latency:
    """The time of one call.

    Attributes:
        p50_ms: Median in milliseconds.
        p90_ms: 90th percentile in milliseconds.
        n: Number of timed calls.
        engine: What ran the model.
        threads: Number of threads.
        batch: Number of samples in one call.
        dtype: Type of the weights.
    """

    p50_ms: float
    p90_ms: float
    n: int
    engine: str
    threads: int
    batch: int
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    engine: str = "eager",
    threads: int | None = None,
    batch: int | None = None,
) -> Latency:
    """Return the time of one call of `model`.

    Args:
        model: The model; it runs in eval mode without gradients and is left as it was.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        engine: ``eager``, ``onnxruntime`` or ``openvino``.
        threads: Number of threads; default: as many as PyTorch uses.
        batch: Number of samples; default: as many as the example has.

    Raises:
        UnknownName: No such engine.
        InvalidInputs: Fewer than one thread or sample.
        MissingDependency: The engine is not installed.
    """
    return compare_latency({"": model}, example_inputs, engine, threads, batch)[""]


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    engine: str = "eager",
    threads: int | None = None,
    batch: int | None = None,
) -> dict[str, Latency]:
    """Return the time of one call of each model, measured in turn; see `measure_latency`."""
    if engine not in _ENGINES:
        raise UnknownName("engine", engine, _ENGINES)
    for name, value in (("threads", threads), ("batch", batch)):
        if value is not None and value < 1:
            raise InvalidInputs(f"{name} must be at least 1; got {value}.")
    threads = threads or torch.get_num_threads()
    inputs = with_batch(as_inputs(example_inputs), batch)
    with ExitStack() as stack:
        calls = {name: stack.enter_context(_ENGINES[engine](model, inputs, threads)) for name, model in models.items()}
        times = _time_in_turn(calls)
    result = {}
    for name, model in models.items():
        milliseconds = [1000 * t for t in times[name]]
        deciles = quantiles(milliseconds, n=10, method="inclusive")
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        size = inputs.tensors()[0].shape[0]
        result[name] = Latency(deciles[4], deciles[8], len(milliseconds), engine, threads, size, dtype)
    return result


def available_engines() -> tuple[str, ...]:
    """Return the engines that are installed here."""
    from importlib.util import find_spec

    needs = {"eager": (), "onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}
    return tuple(engine for engine, modules in needs.items() if all(find_spec(m) for m in modules))


def _time_in_turn(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    start, warm_up_rounds = perf_counter(), 0
    while perf_counter() - start < WARM_UP_SECONDS * len(calls) or warm_up_rounds < 2:
        for call in calls.values():
            call()
        warm_up_rounds += 1
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = perf_counter(), 0
    while (perf_counter() - start < TIMED_SECONDS * len(calls) or rounds < CALLS[0]) and rounds < CALLS[1]:
        for name, call in calls.items():
            before = perf_counter()
            call()
            times[name].append(perf_counter() - before)
        rounds += 1
    return times


# ----------------------------------------------------------------------------------------------------- engines


@contextmanager
def _eager(model: nn.Module, inputs: Inputs, threads: int) -> Iterator[Call]:
    cuda = next(model.parameters()).is_cuda
    before = torch.get_num_threads()

    def call() -> None:
        model(*inputs.args, **inputs.kwargs)
        if cuda:
            torch.cuda.synchronize()

    with undisturbed(model), torch.inference_mode():
        torch.set_num_threads(threads)
        try:
            yield call
        finally:
            torch.set_num_threads(before)


@contextmanager
def _onnx_file(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Path, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        artifact = onnx.export(model, inputs, Path(folder) / "model.onnx")
        yield artifact.path, onnx.feed(artifact.path, inputs)


@contextmanager
def _onnxruntime(model: nn.Module, inputs: Inputs, threads: int) -> Iterator[Call]:
    runtime = optional_import("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    with _onnx_file(model, inputs) as (path, feed):
        session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        yield lambda: session.run(None, feed)


@contextmanager
def _openvino(model: nn.Module, inputs: Inputs, threads: int) -> Iterator[Call]:
    openvino = optional_import("openvino", "openvino")
    with _onnx_file(model, inputs) as (path, feed):
        # Without the hint OpenVINO picks bfloat16 where the processor has it, and the comparison would be false.
        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(os.fspath(path), "CPU", settings)
        request = compiled.create_infer_request()
        yield lambda: request.infer(feed)


_ENGINES: dict[str, Callable[[nn.Module, Inputs, int], Any]] = {
    "eager": _eager,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
