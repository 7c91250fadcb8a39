"""Networks that skip channels beside dense ones, one image at a time: python -m benchmarks.skipping.

Each network is timed in turn with the same one with gates, at three densities. The weights are random; so are the
predictors, so that every image has channels of its own. Beside the plain dense network stands the one whose batch
normalizations are folded into its convolutions, and the time that ONNX Runtime takes for it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks import write_record
from benchmarks.networks import resnet50
from secateur.core.slots import Scope
from secateur.measure.latency import compare_latency
from secateur.measure.profile import count_macs, macs_per_sample
from secateur.parts.granularity.channel_per_input import ChannelPerInput, normalized_convolutions
from secateur.structure.inputs import as_inputs
from secateur.structure.surgery import replace_module
from secateur.tasks.networks import build_network

DENSITIES = (1, 0.5, 0.25)
DEVIATION = 0.05
"""Of the predictors' weights, as in the method."""


def main() -> None:
    """Time all networks and write the record."""
    torch.set_num_threads(1)
    cases = {
        "ResNet-8, width 16, 28x28": time_case(build_network("resnet8", 16, 28, 3), torch.randn(1, 3, 28, 28)),
        "ResNet-8, width 128, 32x32": time_case(build_network("resnet8", 128, 32, 3), torch.randn(1, 3, 32, 32)),
        "ResNet-50, 224x224": time_case(resnet50(), torch.randn(1, 3, 224, 224)),
    }
    best = min(case["relative"]["0.25"] for case in cases.values())
    claim = "the time of one image where a quarter of each layer's channels is computed, relative to the dense network"
    write_record("skipping", {"claim": claim, "result": f"{best:.2f}", "threads": 1, "cases": cases})


def time_case(dense: nn.Module, x: Tensor) -> dict[str, Any]:
    """Return milliseconds of the dense forms, and the relative time and MACs of each density."""
    torch.manual_seed(0)
    dense = dense.eval()
    gated = {f"{density:g}": with_gates(dense, x, density) for density in DENSITIES}
    times = compare_latency({"dense": dense, "folded": folded(dense, x), **gated}, x)
    milliseconds = {name: time.p50_ms for name, time in times.items()}
    macs = count_macs(dense, x).total
    return {
        "dense_ms": round(milliseconds["dense"], 3),
        "folded_ms": round(milliseconds["folded"], 3),
        "onnxruntime_ms": round(compare_latency({"": dense}, x, "onnxruntime")[""].p50_ms, 3),
        "relative": {name: round(milliseconds[name] / milliseconds["dense"], 3) for name in gated},
        "macs": {name: round(float(macs_per_sample(model, x)) / macs, 3) for name, model in gated.items()},
    }


def with_gates(dense: nn.Module, x: Tensor, density: float) -> nn.Module:
    """Return the network with so many channels of each layer computed."""
    model = copy.deepcopy(dense)
    units = ChannelPerInput().units(model, x, Scope())
    for gate in units.gates.values():
        nn.init.normal_(gate.saliency.weight, std=DEVIATION)
        gate.winners = round(density * gate.winners)
    assert bool(model(x).isfinite().all())
    return model


def folded(dense: nn.Module, x: Tensor) -> nn.Module:
    """Return the network with each batch normalization folded into the convolution before it."""
    model = copy.deepcopy(dense)
    for path, norm in normalized_convolutions(model, as_inputs(x)).items():
        fused = fuse_conv_bn_eval(model.get_submodule(path), model.get_submodule(norm))
        replace_module(model, path, fused)
        replace_module(model, norm, nn.Identity())
    return model.eval()


if __name__ == "__main__":
    main()
