"""Networks composed at random: the analysis verifies, every cut is exact, and what is left is an ordinary network."""

from __future__ import annotations

import copy
import json
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.structure.blocks import BLOCKS
from tests.structure.blocks.networks import EXAMPLES, network
from tests.structure.cuts import random_cut, runs_a_statistic
from torch import nn

import secateur as sc
from secateur.structure.dims import leaves
from secateur.structure.inputs import relative_error, state_of
from secateur.structure.plan import Plan, parse_plan
from secateur.structure.prove import prove_cut
from secateur.structure.surgery import apply_plan, cut_copy, make_plan, skeleton
from secateur.testing.oracle import oracle_error


@st.composite
def recipes(draw) -> tuple[str, int, list[str], int]:
    """A form, a width, one to four kinds of block, and the seed that chooses their variants."""
    form = draw(st.sampled_from(sorted(EXAMPLES)))
    kinds = sorted(name for name, block in BLOCKS.items() if block.form == form)
    names = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    return form, draw(st.integers(3, 6)), names, draw(st.integers(0, 10_000))


def free_share(structure: sc.Structure, prefix: str) -> float:
    """The share of the dims of parameters that can be cut; sizes of 1 and convolution kernels do not count."""
    free = {axis.leaf for axis in structure.prunable}
    counted = [
        [node for node in leaves(dim) if node.size > 1 and not any("kernel" in reason for reason in node.reasons)]
        for name in structure.parameters
        if name.startswith(prefix)
        for dim in structure.tensors[name]
    ]
    counted = [nodes for nodes in counted if nodes]
    return sum(any(node in free for node in nodes) for nodes in counted) / max(len(counted), 1)


def assert_trains(model: nn.Module, x: torch.Tensor) -> None:
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = model(x).square().mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def assert_loads_into_a_new_network(fresh: nn.Module, small: nn.Module, plan: Plan, x: torch.Tensor) -> None:
    empty = skeleton(fresh)
    apply_plan(empty, parse_plan(json.loads(json.dumps(plan.model_dump(mode="json")))))
    assert {n: t.shape for n, t in state_of(empty).items()} == {n: t.shape for n, t in state_of(small).items()}
    empty.to_empty(device="cpu").load_state_dict(small.state_dict())
    assert relative_error(empty.eval()(x), small(x)) == 0


def assert_all_holds(form: str, width: int, names: list[str], seed: int) -> None:
    model, x = network(form, width, names, seed)
    structure = sc.trace(model, x)
    verification = structure.verify(model)
    assert verification.ok and verification.max_error < 1e-9
    if all(BLOCKS[name].local for name in names):
        shares = {f"{i} {name}": free_share(structure, f"blocks.{i}.") for i, name in enumerate(names)}
        assert all(share >= BLOCKS[name.split()[1]].least for name, share in shares.items()), shares

    kept = random_cut(structure, Random(seed))
    assert prove_cut(model, structure, kept).ok
    plan = make_plan(structure, kept)
    small = cut_copy(model, plan)
    if not runs_a_statistic(structure, kept):
        assert oracle_error(model, small, plan, x) < 1e-10

    again, predicted = sc.trace(small, x), structure.cut(kept)
    for name, tensor in state_of(small).items():
        assert tuple(dim.size for dim in predicted.tensors[name]) == tuple(tensor.shape)
        assert tuple(dim.size for dim in again.tensors[name]) == tuple(tensor.shape)
    assert again.macs({}) == sc.profile(small, x).macs
    lost_an_axis = any(int(mask.sum()) == 1 for mask in kept.values())  # PyTorch's einsum does not multiply over one
    if not lost_an_axis and "experts" not in names:  # other values, other experts
        assert predicted.macs({}) == again.macs({})
    assert predicted.params({}) == again.params({}) == sc.profile(small, x).params
    assert again.verify(small).ok

    assert_trains(small, x)
    assert_loads_into_a_new_network(network(form, width, names, seed)[0], small, plan, x)


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(recipes())
def test_random_networks(recipe):
    assert_all_holds(*recipe)


@pytest.mark.thorough
@settings(
    max_examples=1000, database=None, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(recipes())
def test_many_random_networks(recipe):
    assert_all_holds(*recipe)


@pytest.mark.parametrize("name", BLOCKS)
def test_each_kind_of_block_can_be_cut(name):
    """A rule that begins to freeze what could be cut is noticed, for every variant of every block."""
    block = BLOCKS[name]
    shares = []
    for seed in range(8):
        model, x = network(block.form, 4 + seed % 3, [name], seed)
        structure = sc.trace(model, x)
        assert structure.verify(model).ok
        shares.append(free_share(structure, "blocks."))
    assert min(shares) >= block.least and min(shares) < block.least + 0.1, shares
