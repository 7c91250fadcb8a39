"""A cut inside a running training: what the training keeps beside the weights is cut by the same plan.

The model stays the same object, but its cut parameters are new tensors (PyTorch's autograd remembers the shapes of the
old ones). The optimizers stay the same objects too, so schedulers, gradient scalers and hooks that hold them go on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from secateur.errors import NotApplicable
from secateur.structure.plan import Plan
from secateur.structure.surgery import apply_plan, check_plan

Indices = Sequence[Tensor | None]
"""For each dim of a parameter the indices that remain; None where all do."""


@dataclass(frozen=True)
class Companions:
    """What follows a model through its cuts.

    Attributes:
        optimizers: Hold parameters of the model. They may hold others too, and need not hold all.
        copies: Networks like the model whose weights are their own: averaged weights (EMA), a teacher to shrink along.

    Raises:
        NotApplicable: An optimizer that keeps one vector for all parameters.
    """

    optimizers: tuple[Optimizer, ...] = ()
    copies: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise NotApplicable(
                    "The state of LBFGS is one vector for all parameters and cannot follow a cut. Train with another "
                    "optimizer, or cut first and make the optimizer from the smaller network."
                )

    def forget(self) -> None:
        """Empty the optimizers' state, for weights that have nothing to do with those before; mutates them."""
        for optimizer in self.optimizers:
            optimizer.state.clear()


ALONE = Companions()


def cut_in_place(model: nn.Module, plan: Plan, companions: Companions = ALONE) -> None:
    """Cut `model` in place, and everything that follows it; pending gradients are cut too.

    What an optimizer remembers of a parameter is cut like the parameter itself. If some of it has a shape from which
    no cut follows, the optimizer forgets this one parameter, with a warning, and begins with it anew.

    Raises:
        PlanMismatch: The plan was made for another model; nothing is changed then.
    """
    for copied in companions.copies:
        check_plan(copied, plan)
    before = dict(model.named_parameters())
    apply_plan(model, plan)
    for copied in companions.copies:
        cut_in_place(copied, plan)
    after = dict(model.named_parameters())
    names = {id(old): name for name, old in before.items() if name in after and after[name] is not old}
    gone = {id(old) for old in before.values()} - {id(new) for new in after.values()} - names.keys()
    for name in names.values():
        _carry_parameter(name, before[name], after[name], plan)
    for optimizer in companions.optimizers:
        for group in optimizer.param_groups:
            # The list stays the same object: some optimizers and wrappers hold it.
            stay = [p for p in group["params"] if id(p) not in gone]
            group["params"][:] = [after[names[id(p)]] if id(p) in names else p for p in stay]
        for old in [old for old in optimizer.state if id(old) in gone]:
            del optimizer.state[old]
        for old in [old for old in optimizer.state if id(old) in names]:
            name = names[id(old)]
            state = _cut_state(optimizer.state.pop(old), old.shape, plan.indices(name))
            if state is not None:
                optimizer.state[after[name]] = state
                continue
            warnings.warn(
                f"{type(optimizer).__name__} remembers something about {name!r} whose shape does not say how to cut it "
                f"from {tuple(old.shape)} to {tuple(after[name].shape)}; it begins with this parameter anew.",
                stacklevel=2,
            )


def _carry_parameter(name: str, old: nn.Parameter, new: nn.Parameter, plan: Plan) -> None:
    """Give a new parameter the pending gradient and the attributes of the old one."""
    if old.grad is not None:
        new.grad = plan.slice(name, old.grad)
    vars(new).update(vars(old))
    if old._backward_hooks or getattr(old, "_post_accumulate_grad_hooks", None):
        warnings.warn(
            f"A gradient hook of {name!r} is lost: the cut made a new parameter. Register it again.", stacklevel=3
        )


def _cut_state(state: dict[str, Any], shape: torch.Size, indices: Indices) -> dict[str, Any] | None:
    """Return what an optimizer remembers of a smaller parameter; None if that cannot be told."""
    result = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            if any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value)):
                return None
            result[key] = value
            continue
        along = _dims_of(value.shape, shape, indices)
        if along is None:
            return None
        for position, dim in along:
            index = indices[dim]
            if index is not None:
                value = value.index_select(position, index.to(value.device))
        result[key] = value
    return result


def _dims_of(found: torch.Size, shape: torch.Size, indices: Indices) -> list[tuple[int, int]] | None:
    """Return which dim of a parameter each dim of one of its statistics runs along, as (dim of statistic, dim).

    The shapes are equal, or dims are reduced to 1 or left out (factored second moments). None if there is no such
    reading, or if two readings would cut differently.
    """
    if found.numel() <= 1:
        return []
    if len(found) == len(shape):
        fits = all(n in (1, size) for n, size in zip(found, shape, strict=True))
        return [(i, i) for i, n in enumerate(found) if n == shape[i]] if fits else None
    readings = [dims for dims in combinations(range(len(shape)), len(found)) if [shape[d] for d in dims] == list(found)]
    if not readings or any(not _same_cut(indices, readings[0], other) for other in readings[1:]):
        return None
    return list(enumerate(readings[0]))


def _same_cut(indices: Indices, first: Iterable[int], second: Iterable[int]) -> bool:
    pairs = [(indices[a], indices[b]) for a, b in zip(first, second, strict=True)]
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
