"""The surgery oracle: an independent judge of a cut.

It knows nothing of axes. It zeroes, in the dense network, every entry of every tensor that the cut network lacks, and
compares outputs. Where no statistic runs over a cut axis (no LayerNorm or GroupNorm over it), the two must agree to
rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from secateur.structure.inputs import as_inputs, call_with_state, relative_error, state_of, undisturbed
from secateur.structure.plan import Plan


def zeroed_twin(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the dense model in which every entry that the plan removes is zero."""
    twin = copy.deepcopy(model)
    for name, tensor in state_of(twin).items():
        if not tensor.is_floating_point():
            continue
        for position, index in enumerate(plan.indices(name)):
            if index is not None:
                gone = torch.ones(tensor.shape[position], dtype=torch.bool)
                gone[index] = False
                with torch.no_grad():
                    tensor.index_fill_(position, gone.nonzero().flatten(), 0.0)
    return twin


def oracle_error(dense: nn.Module, small: nn.Module, plan: Plan, example_inputs: Any) -> float:
    """Return the relative difference, in float64, between the cut network and the zeroed dense one.

    Args:
        dense: The network before the cut.
        small: The network after the cut, with the weights that the cut left (not trained since).
        plan: What the cut kept.
        example_inputs: Inputs of both.
    """
    inputs = as_inputs(example_inputs).to(torch.float64)
    twin, small = zeroed_twin(dense, plan).double(), copy.deepcopy(small).double()
    with undisturbed(twin), undisturbed(small):
        expected = call_with_state(twin, state_of(twin), inputs)
        found = call_with_state(small, state_of(small), inputs)
    return relative_error(found, expected)
