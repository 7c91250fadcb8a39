"""Analysis of a language model of 70 billion parameters without its memory: python -m benchmarks.large_model.

The network is on PyTorch's meta device; its structure is verified on a small twin of the same configuration. Needs
transformers.
"""

from __future__ import annotations

import resource
from time import perf_counter
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import write_record
from benchmarks.coverage.zoo import allow_torchvision

LARGE = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
TWIN = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 120,
}
TOKENS = 128
SECONDS, GIGABYTES = 60.0, 4.0


def main() -> None:
    """Trace, cost a plan, verify by a twin, and write the record."""
    torch.set_num_threads(2)
    twin = _llama(TWIN)
    start = perf_counter()
    with torch.device("meta"):
        model = _llama(LARGE)
    built = perf_counter()
    structure = sc.trace(model, torch.zeros(1, TOKENS, dtype=torch.long))
    traced = perf_counter()
    half = {axis.name: axis.size // 2 for axis in structure.prunable}
    costs = {
        "params": structure.params({}),
        "macs": structure.macs({}),
        "params_if_every_axis_were_half": structure.params(half),
        "macs_if_every_axis_were_half": structure.macs(half),
    }
    costed = perf_counter()
    verification = sc.verify_by_twin(structure, twin, torch.randint(0, TWIN["vocab_size"], (1, 16)))
    verified = perf_counter()
    assert verification.ok, verification.reason
    assert costs["params"] == sum(p.numel() for p in model.parameters())
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = verified - start
    write_record(
        "large_model",
        {
            "claim": f"analysis of a Llama of {costs['params'] / 1e9:.1f} billion parameters without its weights, "
            "verified on a small twin: seconds, and peak GB of the whole process "
            f"(under {SECONDS:.0f} and {GIGABYTES:.0f})",
            "result": f"{seconds:.1f} and {gigabytes:.1f}",
            "limits": [SECONDS, GIGABYTES],
            "build_s": round(built - start, 3),
            "trace_s": round(traced - built, 3),
            "costs_s": round(costed - traced, 3),
            "verify_by_twin_s": round(verified - costed, 3),
            "peak_gigabytes": round(gigabytes, 3),
            "twin_max_error": verification.max_error,
            "axes": len(structure.axes),
            "free_axes": len(structure.prunable),
            **costs,
            "configuration": LARGE,
            "twin": TWIN,
        },
    )


def _llama(sizes: dict[str, Any]) -> nn.Module:
    allow_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))
    return model.eval()


if __name__ == "__main__":
    main()
