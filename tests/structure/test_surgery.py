from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.errors import InvalidFile, PlanMismatch
from secateur.structure.plan import Plan, parse_plan
from secateur.structure.prove import proved_structure
from secateur.structure.surgery import apply_plan, cut_copy, make_plan, skeleton
from secateur.tasks.networks import ResNet
from secateur.testing.oracle import oracle_error, zeroed_twin
from secateur.testing.toys import NETWORKS, DenseLayer, InvertedResidual, toy

WITHOUT_STATISTICS = ("resnet20", "mobilenet", "densenet", "squeeze_excite", "mlp")


def random_kept(structure, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for axis in structure.prunable:
        mask = torch.zeros(axis.size, dtype=torch.bool)
        mask[torch.randperm(axis.size, generator=generator)[: max(1, round(share * axis.size))]] = True
        kept[axis.name] = mask
    return kept


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_independent_oracle_agrees_in_float64(name, share):
    model, x = toy(name)
    model, x = model.double(), x.double()
    structure = proved_structure(model, x)
    plan = make_plan(structure, random_kept(structure, share=share))
    assert oracle_error(model, cut_copy(model, plan), plan, x) < 1e-10


def test_the_oracle_notices_a_swapped_channel():
    model, x = toy("resnet20")
    structure = proved_structure(model, x)
    plan = make_plan(structure, random_kept(structure))
    small = cut_copy(model, plan)
    with torch.no_grad():
        small.blocks[0].conv2.weight.copy_(
            small.blocks[0].conv2.weight[:, torch.randperm(small.blocks[0].conv2.in_channels).flip(0)]
        )
        small.blocks[0].conv2.weight[:, 0] += 1
    assert oracle_error(model, small, plan, x) > 1e-3


def test_zeroed_twin_keeps_shapes_and_zeroes_the_rest():
    model, x = toy("mlp")
    structure = sc.trace(model, x)
    plan = make_plan(structure, {"1": torch.arange(32) < 2})
    twin = zeroed_twin(model, plan)
    assert twin[1].weight.shape == (32, 48) and int((twin[1].weight.abs().sum(1) > 0).sum()) == 2
    assert int((twin[3].weight.abs().sum(0) > 0).sum()) == 2


def test_layers_say_their_new_sizes_and_the_class_is_the_same():
    model, x = toy("mobilenet")
    structure = proved_structure(model, x)
    small = cut_copy(model, make_plan(structure, {"3.expand.0": torch.arange(48) < 10}))
    depthwise = small[3].depthwise[0]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (10, 10, 10)
    assert small[3].expand[1].num_features == 10 and small[3].project[0].in_channels == 10
    assert type(small[3]) is InvertedResidual and model[3].depthwise[0].groups == 48


def test_the_cut_network_trains():
    model, x = toy("vit")
    structure = proved_structure(model, x)
    small = cut_copy(model, make_plan(structure, random_kept(structure))).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    target = torch.tensor([1, 2])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(x), target)
        loss.backward()
        assert all(p.grad is not None for p in small.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_shared_tensors_stay_shared():
    class Tied(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.b(self.a(x).relu()).relu())

    structure = proved_structure(Tied(6).eval(), torch.randn(2, 6))
    assert "input" in structure.axis("a").reason  # one tensor: its rows are its columns, which are the input

    model = nn.Sequential(nn.Linear(6, 4), Tied(4)).eval()
    structure = proved_structure(model, torch.randn(2, 6))
    assert [axis.size for axis in structure.prunable] == [4]
    small = cut_copy(model, make_plan(structure, random_kept(structure)))
    assert small[1].a.weight is small[1].b.weight and small[1].a.weight.shape == (2, 2)


def test_frozen_parameters_stay_frozen_and_gradients_are_dropped():
    model, x = toy("mlp")
    model[1].weight.requires_grad_(False)
    model[3].weight.grad = torch.ones_like(model[3].weight)
    small = cut_copy(model, make_plan(sc.trace(model, x), {"1": torch.arange(32) < 2}))
    assert not small[1].weight.requires_grad and small[1].bias.requires_grad and small[3].weight.grad is None


def test_a_skeleton_has_shapes_and_no_memory():
    model, _ = toy("resnet20")
    bones = skeleton(model)
    assert all(p.is_meta for p in bones.parameters()) and all(b.is_meta for b in bones.buffers())
    assert {n: p.shape for n, p in bones.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert not next(model.parameters()).is_meta


def test_a_plan_survives_json_and_cuts_the_same():
    model, x = toy("vit")
    structure = proved_structure(model, x)
    plan = make_plan(structure, random_kept(structure))
    again = parse_plan(json.loads(json.dumps(plan.model_dump(mode="json"))))
    assert again == plan
    a, b = cut_copy(model, plan), cut_copy(model, again)
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert plan.shape("blocks.0.attention.qkv.weight") == tuple(a.blocks[0].attention.qkv.weight.shape)


def test_a_plan_for_another_model_is_refused_and_nothing_changes():
    model, x = toy("resnet20")
    structure = proved_structure(model, x)
    plan = make_plan(structure, random_kept(structure))
    other = ResNet(20, 12, channels=3)
    before = {k: v.shape for k, v in other.state_dict().items()}
    with pytest.raises(PlanMismatch, match="expects 'conv1.weight' with shape"):
        apply_plan(other, plan)
    assert before == {k: v.shape for k, v in other.state_dict().items()}

    model, x = toy("vit")
    structure = proved_structure(model, x)
    plan = make_plan(structure, random_kept(structure))
    renamed = copy.deepcopy(model)
    renamed.blocks[0].attention.heads = 99
    with pytest.raises(PlanMismatch, match=r"blocks.0.attention.heads = 3, got 99"):
        apply_plan(renamed, plan)


@pytest.mark.parametrize(
    "damage",
    [
        {"axes": {"a": {"size": 4, "kept": [0, 4]}}},
        {"axes": {"a": {"size": 4, "kept": []}}},
        {"axes": {"a": {"size": 4, "kept": [1, 1]}}},
        {"axes": {"a": {"size": "four", "kept": [1]}}},
        {"surprise": 1},
    ],
)
def test_damaged_plans_are_refused(damage):
    with pytest.raises(InvalidFile, match="plan"):
        parse_plan(damage)


def test_an_empty_plan_changes_nothing():
    model, x = toy("mlp")
    same = cut_copy(model, Plan())
    assert torch.equal(same(x), model(x))


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(2, 6), min_size=2, max_size=5),
    kinds=st.lists(st.sampled_from(["plain", "residual", "dense", "depthwise", "excite"]), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_random_networks_are_verified_and_their_cuts_exact(widths, kinds, seed):
    """Networks composed at random: the analysis verifies and the independent oracle holds in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    channels = 3
    for width, kind in zip(widths, kinds, strict=False):
        if kind == "plain":
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        elif kind == "residual":
            layers.append(InvertedResidual(channels, channels, 2, 1))
        elif kind == "dense":
            layers.append(DenseLayer(channels, width))
            channels += width
        elif kind == "depthwise":
            layers += [nn.Conv2d(channels, 2 * channels, 3, padding=1, groups=channels), nn.Hardswish()]
            channels *= 2
        else:
            layers += [nn.Conv2d(channels, width, 1), nn.AvgPool2d(1), nn.GELU()]
            channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    structure = sc.trace(model, x)
    assert structure.verify(model).ok
    plan = make_plan(structure, random_kept(structure, seed))
    assert oracle_error(model, cut_copy(model, plan), plan, x) < 1e-10


def test_every_toy_is_listed():
    assert set(WITHOUT_STATISTICS) < set(NETWORKS)
