"""What ``secateur inspect --safe-sparsity`` prints: up to where random pruning cuts no signal of the data off."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from rich.markup import escape
from rich.table import Table

from secateur.cli.common import call_for_model, console, data_of, messages, print_json
from secateur.errors import DataNeeded
from secateur.measure.safe_sparsity import safe_sparsity
from secateur.tasks import find_task

if TYPE_CHECKING:
    from torch import nn

    from secateur.measure.safe_sparsity import Estimate, SafeSparsity


def show(reference: str, data: str | None, seed: int, as_json: bool) -> None:
    """Estimate and print the safe sparsity of a network.

    Args:
        reference: ``module:function``, a network of a library, or TASK/NETWORK with random weights.
        data: ``module:function`` that returns batches; tasks have their own.
        seed: Draws random weights, and masks.
        as_json: Print the numbers alone.

    Raises:
        DataNeeded: There are none.
    """
    torch.manual_seed(seed)
    network, batches = _network_and_data(reference, data, seed)
    with messages.status("looking for signals ..."):
        found = safe_sparsity(network, batches, seed=seed)
    if as_json:
        print_json(_as_dict(found))
    else:
        _print(reference, found)


def _network_and_data(reference: str, data: str | None, seed: int) -> tuple[nn.Module, Any]:
    if ":" in reference:
        if data is None:
            raise DataNeeded(
                "Which units carry a signal shows in data only: give --data module:function that returns batches "
                "(inputs, class indices)."
            )
        return call_for_model(reference), data_of(data)[0]
    name, _, network = reference.partition("/")
    task = find_task(name)
    return task.build(network), task.train_batches(seed) if data is None else data_of(data)[0]


def _print(reference: str, found: SafeSparsity) -> None:
    console.print(f"[bold]{escape(reference)}[/]: how much may be pruned at random, of {_weights(found)} weights\n")
    summary = Table(box=None, pad_edge=False)
    for heading in ("", f"safe ({found.confidence:.0%})", "first loss"):
        summary.add_column(heading, justify="right" if heading else "left")
    summary.add_row("each layer by its own density", *_cells(found.by_layer))
    summary.add_row("the same density in every layer", *_cells(found.uniform))
    console.print(summary)
    n = len(found.by_layer.draws)
    console.print(
        "Safe: with that probability no unit is cut off. First loss: the sparsity at which the first one was, mean of "
        f"{n} random masks with its 95 % interval.\n",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "weights", "inputs", "with a signal", "safe sparsity"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in found.layers:
        safe = f"{100 * (1 - layer.density):.1f} %" if layer.signals else "not judged"
        table.add_row(escape(layer.name), f"{layer.weights:,}", f"{layer.inputs:,}", f"{layer.signals:,}", safe)
    console.print(table)
    console.print(f"\n{found.assumptions}", highlight=False, markup=False)


def _weights(found: SafeSparsity) -> str:
    from secateur.measure.report import count

    return count(sum(layer.weights for layer in found.layers))


def _cells(estimate: Estimate) -> tuple[str, str]:
    return f"{100 * estimate.safe:.1f} %", f"{100 * estimate.mean:.1f} ± {100 * estimate.half_width:.1f} %"


def _as_dict(found: SafeSparsity) -> dict[str, Any]:
    means = {
        kind: {"mean": estimate.mean, "half_width": estimate.half_width}
        for kind, estimate in (("by_layer", found.by_layer), ("uniform", found.uniform))
    }
    data = asdict(found)
    for kind, more in means.items():
        data[kind] |= more
    return {**data, "assumptions": found.assumptions}
