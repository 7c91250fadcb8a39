from __future__ import annotations

import pytest
import torch

import secateur as sc
from secateur.errors import InvalidRecipe, NothingPrunable
from secateur.parts.granularity.channel import MULTIPLES
from secateur.testing.toys import GroupedQueries, toy

BUDGET = sc.Budget(macs=0.5)


@pytest.mark.parametrize(
    ("granularity", "network", "cut"),
    [
        ("head", "vit", ("blocks.0.attention.qkv[heads]", "blocks.1.attention.qkv[heads]")),
        ("head_dim", "vit", ("blocks.0.attention.qkv[head_dim]", "blocks.1.attention.qkv[head_dim]")),
        ("hidden", "vit", ("blocks.0.mlp.0", "blocks.1.mlp.0")),
        ("residual", "vit", ("patches",)),
        ("residual", "resnet20", ("blocks.3.conv2", "blocks.6.conv2", "conv1")),
    ],
)
def test_a_role_limits_the_axes(granularity, network, cut):
    model, x = toy(network)
    result = sc.prune(model, x, granularity=granularity, budget=sc.Budget(params=0.9))
    assert set(result.structure_plan.axes) <= set(cut) and result.after.params <= 0.9 * result.before.params
    assert result.proofs[-1].ok and result.recipe.granularity.name == granularity


def test_heads_of_grouped_queries_leave_with_their_keys():
    result = sc.prune(
        GroupedQueries(copied=False).eval(), torch.randn(2, 7, 12), granularity="kv_group", budget=sc.Budget(macs=0.6)
    )
    small = result.model
    assert (small.q.out_features, small.k.out_features, small.v.out_features, small.o.in_features) == (10, 5, 5, 10)
    again = sc.prune(
        GroupedQueries(copied=False).eval(), torch.randn(2, 7, 12), granularity="head", budget=sc.Budget(macs=0.6)
    )
    assert again.structure_plan.axes.keys() == result.structure_plan.axes.keys()


def test_a_role_that_no_axis_has_is_an_error_with_the_reason():
    model, x = toy("resnet20")
    with pytest.raises(NothingPrunable, match="it has no axis of the role 'kv group'"):
        sc.prune(model, x, granularity="kv_group", budget=sc.Budget(macs=0.5))
    model, x = GroupedQueries(copied=False).eval(), torch.randn(2, 7, 12)
    with pytest.raises(NothingPrunable, match=r"removed: query heads of one key \(scaled_dot_product_attention\)\. "):
        sc.prune(model, x, granularity={"name": "channel", "roles": ["query head"]}, budget=BUDGET)
    with pytest.raises(InvalidRecipe):
        sc.prune(model, x, granularity={"name": "channel", "roles": ["arm"]}, budget=BUDGET)


def test_round_to_names_an_engine_and_leaves_numbers_of_heads_alone():
    model, x = toy("vit")
    result = sc.prune(
        model,
        x,
        granularity={"name": "channel", "round_to": "onnxruntime"},
        budget=sc.Budget(macs=0.5),
        method="random",
    )
    sizes = {name: len(axis.kept) for name, axis in result.structure_plan.axes.items()}
    heads = [n for name, n in sizes.items() if "heads" in name]
    assert heads and all(n < 3 for n in heads)
    assert all(n % MULTIPLES["onnxruntime"] == 0 for name, n in sizes.items() if "heads" not in name)
    with pytest.raises(InvalidRecipe):
        sc.prune(model, x, granularity={"name": "channel", "round_to": "tensorrt"}, budget=BUDGET)
