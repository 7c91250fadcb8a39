"""What convolutions that choose their channels for each input (`structure.gated`) take at most, whatever the input.

A gated convolution takes (channels that it reads) x (channels that it computes) of its multiply-adds. It computes as
many as it has winners. It reads those that are not zero: what gates before it have let through, which may be one gate
(its winners), several that were added or concatenated (their winners together, all channels at most), or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from secateur.structure.gated import gates_of
from secateur.structure.inputs import Inputs, as_inputs, call_with_state, redrawn, undisturbed, with_batch

Case = tuple[int, slice]
"""The number of the gate that is open, and which of its channels."""

CASES_AT_ONCE = 16
"""Samples in one run of the network; more take more memory."""


class Wiring:
    """Which gates decide what each gated convolution reads.

    Found by running the network: with no gate open, with each alone open, and with one channel of each alone open.

    Args:
        model: The network; runs in eval mode, and is left as it was.
        example_inputs: Their shapes count, not their values.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self._gates = gates_of(model)
        self._sizes = {path: gate.convolution.out_channels for path, gate in self._gates.items()}
        n = len(self._gates)
        cases = [(-1, slice(0)), *((i, slice(None)) for i in range(n)), *((i, slice(1)) for i in range(n))]
        reads = self._probed(model, as_inputs(example_inputs), cases)
        self._always = {path: int(nonzero[0].sum()) for path, nonzero in reads.items()}
        self._most = {path: int(nonzero.any(0).sum()) for path, nonzero in reads.items()}
        fed = {path: (nonzero & ~nonzero[0]).sum(1).tolist()[1:] for path, nonzero in reads.items()}
        self._feeds = {
            path: {source: (feeds[i], feeds[n + i]) for i, source in enumerate(self._gates) if feeds[i]}
            for path, feeds in fed.items()
        }

    def reads(self, winners: Mapping[str, int]) -> dict[str, int]:
        """Return how many input channels each gated convolution reads at most, if each gate has so many winners."""
        return {
            path: min(
                self._most[path],
                self._always[path] + sum(self._fed(source, *feed, winners[source]) for source, feed in feeds.items()),
            )
            for path, feeds in self._feeds.items()
        }

    def shares(self, winners: Mapping[str, int]) -> dict[str, float]:
        """Return the share of its multiply-adds that each gated convolution takes at most, in [0, 1], by weight."""
        reads = self.reads(winners)
        return {
            f"{path}.convolution.weight": reads[path] / gate.convolution.in_channels * winners[path] / self._sizes[path]
            for path, gate in self._gates.items()
        }

    def _fed(self, source: str, all_open: int, one_open: int, winners: int) -> int:
        """Return how many channels the winners of a gate fill: each its own ones, or all, if something mixes them."""
        size = self._sizes[source]
        return ceil(winners * all_open / size) if one_open * size <= all_open else all_open

    def _probed(self, model: nn.Module, inputs: Inputs, cases: Sequence[Case]) -> dict[str, Tensor]:
        """Return which input channels of each gated convolution are not zero: (cases, channels), by path."""
        reads: dict[str, list[Tensor]] = {path: [] for path in self._gates}
        for start in range(0, len(cases), CASES_AT_ONCE):
            chunk = cases[start : start + CASES_AT_ONCE]
            given = with_batch(redrawn(with_batch(inputs, 1), seed=0), max(2, len(chunk)))  # one alone would be skipped
            with undisturbed(model), ExitStack() as stack:
                for i, (path, gate) in enumerate(self._gates.items()):
                    stack.callback(gate.register_forward_pre_hook(_recorded(reads[path], len(chunk))).remove)
                    stack.callback(gate.register_forward_hook(_opened(i, chunk)).remove)
                for module in _shifting(model):
                    stack.callback(module.register_forward_hook(lambda module, args, output: output + 1).remove)
                call_with_state(model, {}, given)
        return {path: torch.cat(pieces) for path, pieces in reads.items()}


def _recorded(reads: list[Tensor], samples: int) -> Any:
    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        reads.append((args[0][:samples] != 0).flatten(2).any(2).cpu())

    return before


def _opened(gate: int, cases: Sequence[Case]) -> Any:
    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = torch.zeros_like(output)
        for sample, (opened, channels) in enumerate(cases):
            if opened == gate:
                output[sample, channels] = 1
        return output

    return after


def _shifting(model: nn.Module) -> list[nn.Module]:
    """Return the layers outside of gates that make something of zeros: those with a shift, even if it is zero now."""
    inside = {id(module) for gate in gates_of(model).values() for module in gate.modules()}
    return [m for m in model.modules() if id(m) not in inside and isinstance(getattr(m, "bias", None), nn.Parameter)]


def winners_of(model: nn.Module) -> dict[str, int]:
    """Return how many channels each gated convolution computes."""
    return {path: gate.winners for path, gate in gates_of(model).items()}


def shares_taken(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return the share of its multiply-adds that each gated convolution takes at most, by weight; empty without gates.

    On the meta device nothing can be probed, and nothing is promised.
    """
    gates = gates_of(model)
    if not gates or any(parameter.is_meta for parameter in model.parameters()):
        return {}
    return Wiring(model, inputs).shares(winners_of(model))
