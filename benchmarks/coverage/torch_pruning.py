"""Torch-Pruning beside it: does it work on a network, is its result right, and how long does it take?

Its README's settings (`plain`), and where a network has attention, what its documents ask for beyond them: the number
of heads of every query, key and value layer, and afterwards the widths that the attention modules store (`head dims`);
or whole heads, as its example for language models does (`whole heads`). The best of the three counts as its result.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from time import process_time
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks.coverage.judge import ForeignTensor, judge, tag
from benchmarks.coverage.processes import OutOfTime, within
from secateur.structure.inputs import as_inputs, call_with_state, output_tensors, state_of, undisturbed

SECONDS = 120
SETTINGS = ("plain", "head dims", "whole heads")
VERDICTS = ("right", "wrong", "no-op", "fails")

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")
_FUSED = ("qkv", "Wqkv", "qkv_proj", "query_key_value")
_QUERIES = (*_FUSED, "q", "query", "q_proj", "q_lin", "to_q", "query_proj", "linear_q")
_KEYS = ("k", "v", "kv", "key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "to_k", "to_v", "key_proj", "value_proj")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "dim_head", "key_value_proj_dim", "head_size")
_WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "embed_dim", "hidden_size", "dim", "d_model", "split_size")


def compare(dense: nn.Module, inputs: Any, setting: str) -> dict[str, Any]:
    """Return verdict, reason, seconds and share of the parameters of a network pruned with one setting."""
    tag(dense)
    model = copy.deepcopy(dense)
    structure = sc.trace(dense, inputs)
    shapes, before = _shapes(dense, inputs), sum(p.numel() for p in model.parameters())
    start = process_time()
    result: dict[str, Any] = {"verdict": "fails"}
    try:
        with within(SECONDS):
            prune(model, inputs, output_layers(model, structure), setting)
        result |= {"seconds": round(process_time() - start, 3)}
        result |= {"params": round(sum(p.numel() for p in model.parameters()) / before, 4)}
        if result["params"] == 1:
            return {**result, "verdict": "no-op", "reason": "nothing was pruned, and nothing said"}
        found = _shapes(model, inputs)
        if found != shapes:
            return {**result, "reason": f"output shapes {found} instead of {shapes}"}
        right, error = judge(dense, model, structure)
        return {**result, "verdict": "right" if right else "wrong", "error": error}
    except OutOfTime:
        return {**result, "reason": f"not done in {SECONDS} s"}
    except ForeignTensor as error:
        return {**result, "verdict": "wrong", "reason": str(error)}
    except Exception as error:
        where, cause = "pruning" if "params" not in result else "forward", error.__cause__ or error
        return {**result, "reason": f"{where}: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"}


def _shapes(model: nn.Module, inputs: Any) -> list[tuple[int, ...]]:
    with undisturbed(model), torch.no_grad():
        return [tuple(t.shape) for t in output_tensors(call_with_state(model, state_of(model), as_inputs(inputs)))]


def prune(model: nn.Module, inputs: Any, ignored: list[nn.Module], setting: str) -> None:
    """Prune half of the channels of `model` in place with Torch-Pruning."""
    import torch_pruning as tp

    arguments = as_inputs(inputs)
    heads = {} if setting == "plain" else dict(_heads(model))
    widths = {layer: layer.out_features for layer in heads}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            dict(arguments.kwargs) or arguments.args,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            round_to=8,
            num_heads=heads,
            prune_num_heads=setting == "whole heads",
            prune_head_dims=setting != "whole heads",
            head_pruning_ratio=0.5 if setting == "whole heads" else 0.0,
            output_transform=lambda output: [t for t in output_tensors(output) if t.grad_fn is not None],
        )
        pruner.step()
    if setting != "plain":
        _repair(model, widths, pruner.num_heads)


def output_layers(model: nn.Module, structure: sc.Structure) -> list[nn.Module]:
    """Return the layers whose output is the network's output, which must keep its width."""
    state = state_of(model)
    frozen = {
        (id(state[name]), dim)
        for axis in structure.axes
        if "output" in axis.leaf.find().reasons
        for name, dim in axis.members
    }
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)
    return [
        module
        for module in model.modules()
        if isinstance(module, layers) and (id(module.weight), int(isinstance(module, nn.ConvTranspose2d))) in frozen
    ]


def settings_for(model: nn.Module) -> tuple[str, ...]:
    """Return the settings that make a difference for a network."""
    return SETTINGS if any(True for _ in _heads(model)) else SETTINGS[:1]


def _heads(model: nn.Module) -> Iterator[tuple[nn.Linear, int]]:
    """Yield every query, key and value layer with its number of heads."""
    for module in model.modules():
        heads = _integer(module, _HEADS)
        if heads is not None:
            for name, layer in module.named_children():
                if isinstance(layer, nn.Linear) and name in _QUERIES:
                    yield layer, heads
                elif isinstance(layer, nn.Linear) and name in _KEYS:
                    yield layer, _integer(module, _KEY_HEADS) or heads


def _integer(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    return None


def _repair(model: nn.Module, widths: dict[nn.Linear, int], heads: dict[nn.Module, int]) -> None:
    """Rewrite what attention modules store about their widths, as Torch-Pruning's examples do by hand."""
    for module in model.modules():
        name, query = next(((n, c) for n, c in module.named_children() if n in _QUERIES and c in widths), ("", None))
        if query is None:
            continue
        parts = 3 if name in _FUSED else 1
        keys = next((c for n, c in module.named_children() if n in _KEYS and c in heads), query)
        new: dict[str, int] = dict.fromkeys(_HEADS, heads[query])
        new |= dict.fromkeys(_HEAD_WIDTHS, query.out_features // parts // heads[query])
        new |= {"num_key_value_groups": heads[query] // heads[keys]}
        before = widths[query] // parts
        new |= {a: query.out_features // parts for a in _WIDTHS if vars(module).get(a) == before}
        for attribute in new.keys() & vars(module).keys():
            setattr(module, attribute, new[attribute])
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):  # as its example for torchvision's ViT
        model.hidden_dim = model.conv_proj.out_channels
