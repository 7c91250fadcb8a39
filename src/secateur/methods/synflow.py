"""SynFlow: prunes before training and without data, and keeps every layer alive.

Tanaka, Kunin, Yamins, Ganguli: Pruning neural networks without any data by iteratively conserving synaptic flow,
NeurIPS 2020, eq. 9 and algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.core.context import Context
from secateur.core.method import Method
from secateur.core.recipe import Recipe
from secateur.core.schedule import Iterative
from secateur.core.slots import Criterion
from secateur.core.units import Scores
from secateur.errors import NotApplicable


class SynFlow(Criterion):
    """The flow through each weight: theta dR/dtheta, with R the sum of the outputs of |network| at inputs of ones.

    The network computes with the absolute values of its weights, without additive constants, in eval mode and float64:
    products of many layers leave the range of float32. With homogeneous activations the scores of every layer then sum
    to R, and at every hidden unit what flows in equals what flows out.
    """

    name = "synflow"

    def score(self, context: Context) -> Scores:
        """Return the flow through each unit; needs no data."""
        state = _positive_state(context.model)
        example = context.units.inputs
        args, kwargs = tree_map(_ones, (example.args, dict(example.kwargs)))
        with context.undisturbed():
            weights = {name: state[name].requires_grad_() for name in context.weights}
            output = torch.func.functional_call(context.model, state, args, kwargs)
            flow = _total(output)
            slopes = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
        flows = {name: weight.detach() * slope for (name, weight), slope in zip(weights.items(), slopes, strict=True)}
        return context.sum_over_units(flows, consumed=True)


def _positive_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers as absolute values in float64; what is added to activations is zero."""
    state: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = tensor.detach()
        if value.is_floating_point():
            added = name.endswith(("bias", "running_mean"))
            value = torch.zeros_like(value, dtype=torch.float64) if added else value.double().abs()
        state[name] = value
    return state


def _ones(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        raise NotApplicable(f"SynFlow feeds ones to the network, which takes {value.dtype} (words, not real numbers).")
    return torch.ones_like(value, dtype=torch.float64)


def _total(output: Any) -> Tensor:
    flow: Tensor = getattr(output, "logits", output).sum()
    if not flow.isfinite():
        raise NotApplicable(f"The synaptic flow of this network is {flow.item()}: too many layers for float64.")
    return flow


METHOD = Method(
    "synflow",
    Recipe(criterion=SynFlow(), mask_from="init", weights_from="init", schedule=Iterative(steps=100, span=0.0)),
)
