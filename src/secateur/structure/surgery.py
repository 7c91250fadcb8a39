"""Surgery: make a model physically smaller according to a plan.

The result stays the user's own class: parameters are sliced, the integers that its code feeds into reshapes are
rewritten where the trace found them, and the size attributes that PyTorch's own layers carry for their ``repr``
follow.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanMismatch
from secateur.structure.attention import close_attention, open_attention
from secateur.structure.dims import size_under
from secateur.structure.dropped import Dropped
from secateur.structure.gated import GatedConv2d
from secateur.structure.inputs import aliases_of, modules_of, state_of
from secateur.structure.plan import (
    AttributeChange,
    AxisCut,
    ConvolutionGate,
    ModuleDrop,
    Plan,
    TensorCut,
    expression_of_dim,
)
from secateur.structure.provenance import Attribute, read_attribute, write_attribute
from secateur.structure.structure import Kept, Structure
from secateur.structure.weightless import weightless

FIELD = "config"
"""The attribute in which models keep what they were built from."""
NOTE = "pruned_by_secateur"
"""The field of a configuration that says what its others cannot express."""

# Sizes that PyTorch's layers store beside their weights: (layer, attribute, tensor, dim). The first tensor that a layer
# has counts.
_LAYER_SIZES: tuple[tuple[type[nn.Module], str, str, int], ...] = (
    (nn.Linear, "out_features", "weight", 0),
    (nn.Linear, "in_features", "weight", 1),
    (nn.Embedding, "num_embeddings", "weight", 0),
    (nn.Embedding, "embedding_dim", "weight", 1),
    (nn.modules.batchnorm._NormBase, "num_features", "running_mean", 0),
    (nn.modules.batchnorm._NormBase, "num_features", "weight", 0),
    (nn.GroupNorm, "num_channels", "weight", 0),
    (nn.PReLU, "num_parameters", "weight", 0),
    (nn.MultiheadAttention, "embed_dim", "in_proj_weight", 1),
    (nn.MultiheadAttention, "kdim", "in_proj_weight", 1),
    (nn.MultiheadAttention, "vdim", "in_proj_weight", 1),
    (nn.MultiheadAttention, "embed_dim", "q_proj_weight", 1),
    (nn.MultiheadAttention, "kdim", "k_proj_weight", 1),
    (nn.MultiheadAttention, "vdim", "v_proj_weight", 1),
    (nn.RNNBase, "input_size", "weight_ih_l0", 1),
    (nn.RNNBase, "hidden_size", "weight_hr_l0", 1),
    (nn.RNNBase, "proj_size", "weight_hr_l0", 0),
    (nn.RNNBase, "hidden_size", "weight_hh_l0", 1),
)


def make_plan(structure: Structure, kept: Kept) -> Plan:
    """Return what remains of the traced model when only the `kept` units of each axis do."""
    away = {name for name, mask in kept.items() if not bool(mask.all())}
    branches = [branch for branch in structure.branches if branch.name in away]
    cut = {name: kept[name] for name in kept if name in away - {branch.name for branch in branches}}
    names = {structure.axis(name).leaf: name for name in cut}
    tensors = {}
    for name, dims in structure.tensors.items():
        expressions = tuple(expression_of_dim(dim, names) for dim in dims)
        if any(not isinstance(expression, int) for expression in expressions):
            tensors[name] = TensorCut(shape=tuple(d.size for d in dims), dims=expressions)
    sizes = structure.sizes({name: int(mask.sum()) for name, mask in cut.items()})
    changes = tuple(
        AttributeChange(module=a.module, name=a.name, index=a.index, before=dim.size, after=size_under(dim, sizes))
        for a, dim in structure.attributes.items()
        if size_under(dim, sizes) != dim.size
    )
    axes = {
        name: AxisCut(size=mask.numel(), kept=tuple(mask.nonzero().flatten().tolist())) for name, mask in cut.items()
    }
    dropped = tuple(ModuleDrop(module=path, entries=n) for branch in branches for path, n in branch.modules)
    return Plan(axes=axes, tensors=tensors, attributes=changes, dropped=dropped)


def apply_plan(model: nn.Module, plan: Plan) -> None:
    """Cut `model` in place; its parameters become new tensors, without gradients. Shared tensors stay shared.

    Raises:
        PlanMismatch: The plan was made for another model; `model` is then untouched.
    """
    check_plan(model, plan)
    for drop in plan.dropped:
        replace_module(model, drop.module, Dropped(drop.entries))
    open_attention(model)
    replaced: dict[int, Tensor] = {}
    for name, tensor in state_of(model).items():
        if name in plan.tensors:
            replaced[id(tensor)] = _cut(name, tensor, plan)
    whole, _ = aliases_of(model)
    replace_tensors(model, replaced)
    share_memory(model, {name: owner for name, owner in whole.items() if name in plan.tensors})
    for change in plan.attributes:
        write_attribute(model, Attribute(change.module, change.name, change.index), change.after)
    _repair_layers(model)
    close_attention(model)
    for gate in plan.gated:
        gate_convolution(model, gate)
    write_note(model, plan)


def gate_convolution(model: nn.Module, gate: ConvolutionGate) -> GatedConv2d:
    """Put a gated convolution in the place of a convolution and its normalization, and return it; mutates `model`."""
    convolution, norm = model.get_submodule(gate.convolution), model.get_submodule(gate.norm)
    assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    gated = GatedConv2d(convolution, norm)
    gated.winners = gate.winners
    replace_module(model, gate.convolution, gated)
    replace_module(model, gate.norm, nn.Identity())
    return gated


def write_note(model: nn.Module, plan: Plan) -> None:
    """Let the configuration say what it cannot express, if there is such a thing; mutates `model`.

    The note also stands under a name that the class computes, if it computes one. Nothing reads it there, for the class
    comes first; but loaders set whatever a saved configuration holds, and what is computed cannot be set. So they fail,
    where a network that lacks layers or computes something else could have been built without an error.
    """
    if plan.note:
        config = getattr(model, FIELD)
        vars(config).update(dict.fromkeys((NOTE, *_computed_names(type(config))[:1]), plan.note))


def _computed_names(kind: type) -> list[str]:
    """Return the attributes that a class computes and that cannot be set; those that more classes share come first."""
    found = [
        name for base in reversed(kind.__mro__) for name, value in vars(base).items() if isinstance(value, property)
    ]
    return [name for name in found if isinstance(own := getattr_static(kind, name), property) and own.fset is None]


def replace_tensors(model: nn.Module, replaced: Mapping[int, Tensor]) -> None:
    """Put new parameters and buffers in the places of old ones, by the ``id`` of the old; mutates `model`."""
    for _, module in modules_of(model):
        for own in (module._parameters, module._buffers):
            tensors: dict[str, Any] = own
            for name, old in tensors.items():
                if id(old) in replaced:
                    tensors[name] = replaced[id(old)]


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put another module in the place of one; mutates `model`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new.train(model.get_submodule(path).training))


def share_memory(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Put each tensor into the memory of another one again, by name -> its name; mutates `model`."""
    state = state_of(model)
    shared: dict[int, Tensor] = {}
    for name, owner in aliases.items():
        own, memory = state[name], state[owner].detach()
        shared[id(own)] = nn.Parameter(memory, own.requires_grad) if isinstance(own, nn.Parameter) else memory
    replace_tensors(model, shared)


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of `model`. Buffers that are the memory of a parameter are so in the copy, too.

    ``copy.deepcopy`` alone gives them memory of their own, and training would then leave them behind.
    """
    twin = copy.deepcopy(model)
    share_memory(twin, aliases_of(model)[0])
    return twin


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose parameters and buffers have shapes but no memory."""
    memo: dict[int, object] = {id(tensor): weightless(tensor) for tensor in state_of(model).values()}
    return copy.deepcopy(model, memo)


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a smaller copy of `model`."""
    small = copied(model)
    apply_plan(small, plan)
    return small


def _cut(name: str, tensor: Tensor, plan: Plan) -> Tensor:
    with torch.no_grad():
        part = (
            torch.empty(plan.shape(name), dtype=tensor.dtype, device="meta")
            if tensor.is_meta
            else plan.slice(name, tensor)
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(part.contiguous(), requires_grad=tensor.requires_grad)
    return part.contiguous()


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Refuse a plan that was made for another model.

    Raises:
        PlanMismatch: A tensor, a module or an attribute is missing or has another size.
    """
    state = state_of(model)
    for name, cut in plan.tensors.items():
        found = tuple(state[name].shape) if name in state else None
        if found != cut.shape:
            got = "no such tensor" if found is None else f"shape {found}"
            raise PlanMismatch(
                f"The plan does not fit this model: it expects {name!r} with shape {cut.shape}, got {got}. "
                "Pass the constructor of the network that was pruned, with the same settings."
            )
    for drop in plan.dropped:
        if drop.module not in dict(modules_of(model)):
            raise PlanMismatch(
                f"The plan does not fit this model: it drops the module {drop.module!r}, and there is none. "
                "Pass the constructor of the network that was pruned, with the same settings."
            )
    _check_gates(model, plan)
    for change in plan.attributes:
        attribute = Attribute(change.module, change.name, change.index)
        try:
            found_value = read_attribute(model, attribute)
        except (AttributeError, IndexError, TypeError):
            found_value = None
        if found_value != change.before:
            raise PlanMismatch(
                f"The plan does not fit this model: it expects {attribute} = {change.before}, got {found_value}. "
                "Pass the constructor of the network that was pruned, with the same settings."
            )


def _check_gates(model: nn.Module, plan: Plan) -> None:
    modules = dict(modules_of(model))
    expected = {gate.convolution: nn.Conv2d for gate in plan.gated} | {gate.norm: nn.BatchNorm2d for gate in plan.gated}
    for path, kind in expected.items():
        if not isinstance(modules.get(path), kind):
            got = type(modules[path]).__name__ if path in modules else "no such module"
            raise PlanMismatch(
                f"The plan does not fit this model: it gates {path!r} and expects a {kind.__name__}, got {got}. "
                "Pass the constructor of the network that was pruned, with the same settings."
            )


def layer_size(module: nn.Module, name: str) -> tuple[Tensor, int] | None:
    """Return the tensor and the dim whose size a layer of PyTorch's keeps in an attribute; None if it is no such."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1 and name in ("in_channels", "out_channels"):
        return module.weight, int((name == "in_channels") != module.transposed)
    for layer, attribute, tensor, dim in _LAYER_SIZES:
        value = getattr(module, tensor, None) if isinstance(module, layer) and attribute == name else None
        if isinstance(value, Tensor):
            return value, dim
    return None


def _repair_layers(model: nn.Module) -> None:
    for _, module in modules_of(model):
        for layer, attribute, tensor, dim in reversed(_LAYER_SIZES):
            value = getattr(module, tensor, None) if isinstance(module, layer) else None
            if isinstance(value, Tensor):
                setattr(module, attribute, value.shape[dim])
        if isinstance(module, nn.modules.conv._ConvNd):
            first, second = module.weight.shape[:2]
            ins, outs = (first, second * module.groups) if module.transposed else (second * module.groups, first)
            module.in_channels, module.out_channels = ins, outs
