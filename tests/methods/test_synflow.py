from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.methods.synflow import SynFlow
from secateur.parts.granularity.weight import Weight
from secateur.tasks.networks import build_network
from secateur.testing.toys import TwoLayer

WIDTHS = (12, 20, 20, 20, 20, 5)


def perceptron(bias=False, widths=WIDTHS, seed=0):
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b, bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), torch.randn(1, widths[0])


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3, bias=False),
    )  # fmt: skip
    return model, torch.randn(1, 2, 10, 10)


def vgg11():
    """The paper's kind of network, at a quarter of its width: every layer lies on every path."""
    torch.manual_seed(0)
    layers, before = [], 3
    for width in (16, "pool", 32, "pool", 64, 64, "pool", 128, 128, "pool", 128, 128, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(before, 10)), torch.zeros(1, 3, 32, 32)


def left(model, x, steps):
    """What 99.9 % sparsity leaves of each layer, and the flow through what is left."""
    schedule = {"name": "iterative", "steps": steps, "span": 0}
    pruned = sc.prune(model, x, method="synflow", budget=sc.Budget(sparsity=0.999), schedule=schedule)
    counts = {name: int(mask.sum()) for name, mask in pruned.masks.items()}
    assert sum(counts.values()) == round(0.001 * sum(mask.numel() for mask in pruned.masks.values()))
    return counts, float(next(iter(score(pruned.model, x).values())).sum())


def score(model, x):
    return SynFlow().score(sc.Context(Weight().units(model, x, Scope())))


def test_scores_are_hand_computed():
    model = TwoLayer(torch.tensor([[1.0, -2.0], [-3.0, 0.0]]), torch.tensor([[-3.0, 1.0]]))
    found = score(model, torch.zeros(1, 2))
    # |W| 1 = (3, 3); R = 3 * 3 + 1 * 3 = 12
    assert found["hidden.weight"].tolist() == [[3, 6], [3, 0]] and found["head.weight"].tolist() == [[9, 3]]
    assert found["hidden.weight"].dtype == torch.float64


@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_the_flow_through_every_layer_is_the_same(make):
    model, x = make()
    totals = torch.stack([values.sum() for values in score(model, x).values()])
    torch.testing.assert_close(totals, totals[:1].expand(len(totals)), rtol=1e-9, atol=0)
    assert totals[0] > 0


def test_what_flows_into_a_hidden_unit_flows_out_of_it():
    flows = list(score(*perceptron()).values())
    for before, after in itertools.pairwise(flows):
        torch.testing.assert_close(before.sum(1), after.sum(0), rtol=1e-9, atol=0)


def test_biases_would_break_the_conservation_and_are_left_out():
    model, x = perceptron(bias=True)
    plain, _ = perceptron()
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "bias" not in name})
    flows = score(model, x)
    assert all(torch.equal(values, flows[name]) for name, values in score(plain, x).items())
    with_biases = {name: tensor.detach().double().abs() for name, tensor in model.named_parameters()}
    leaves = {name: t.requires_grad_() for name, t in with_biases.items()}
    torch.func.functional_call(model, leaves, torch.ones_like(x).double()).sum().backward()
    totals = [float((t.detach() * t.grad).sum()) for name, t in leaves.items() if t.dim() > 1]
    assert max(totals) / min(totals) > 1.01


def test_eighty_layers_leave_the_range_of_float32_and_not_ours():
    model, x = perceptron(widths=(64,) * 81)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(4)
    assert (
        not torch.func.functional_call(model, {n: p.abs() for n, p in model.named_parameters()}, x.abs())
        .isfinite()
        .all()
    )
    assert all(bool(values.isfinite().all()) for values in score(model, x).values())
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(1e4)
    with pytest.raises(NotApplicable, match="too many layers"):
        score(model, x)


def test_the_flow_falls_from_cut_to_cut():
    model, x = perceptron()
    flows = []
    for steps in (1, 2, 4, 8):  # the same cuts, 8 in all: what is left after the first, the second ...
        keep = 0.05 ** (steps / 8)
        pruned = sc.prune(
            model, x, method="synflow", budget=sc.Budget(sparsity=1 - keep),
            schedule={"name": "iterative", "steps": steps, "span": 0},
        )  # fmt: skip
        flows.append(float(score(pruned.model, x)["0.weight"].sum()))
    assert flows == sorted(flows, reverse=True) and flows[-1] > 0


def test_at_999_permille_no_layer_is_empty_with_100_cuts_and_one_is_with_one():
    model, x = perceptron(widths=(64, *(100,) * 6, 10))
    budget = sc.Budget(sparsity=0.999)
    fewest = {}
    for steps in (1, 100):
        schedule = {"name": "iterative", "steps": steps, "span": 0}
        found = sc.prune(model, x, method="synflow", budget=budget, schedule=schedule)
        fewest[steps] = min(int(mask.sum()) for mask in found.masks.values())
        assert sum(int(mask.sum()) for mask in found.masks.values()) == 57
    assert fewest[100] >= 5 and fewest[1] == 0


def test_at_999_permille_no_layer_of_a_convolutional_network_is_empty():
    model, x = vgg11()
    counts, flow = left(model, x, 100)
    assert min(counts.values()) > 0 and flow > 0
    counts, flow = left(model, x, 1)
    assert min(counts.values()) == 0 == flow


@pytest.mark.parametrize(("name", "width", "size"), [("resnet8", 32, 24), ("resnet20", 16, 28)])
def test_at_999_permille_only_branches_beside_an_identity_are_empty_in_residual_networks(name, width, size):
    """What is conserved is the flow through all that separates inputs from outputs, identities included."""
    torch.manual_seed(0)
    model, x = build_network(name, width, size), torch.zeros(1, 1, size, size)
    counts, flow = left(model, x, 100)
    avoidable = {f"blocks.{i}.conv" for i, b in enumerate(model.blocks) if isinstance(b.shortcut, nn.Identity)}
    empty = {layer.removesuffix("1.weight").removesuffix("2.weight") for layer, count in counts.items() if count == 0}
    assert empty and empty <= avoidable and flow > 0
    assert all(counts[f"{branch}1.weight"] == counts[f"{branch}2.weight"] == 0 for branch in empty)
    counts, flow = left(model, x, 1)
    assert flow == 0 and not any(count for layer, count in counts.items() if layer.startswith("blocks"))


def test_it_needs_no_data_and_no_words():
    model, x = perceptron()
    context = sc.Context(Weight().units(model, x, Scope()), [(x, torch.zeros(1, dtype=torch.long))])
    SynFlow().score(context)
    assert context.samples_used == 0
    assert len(sc.method("synflow").recipe.schedule.levels(0.1)) == 100
    words = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    with pytest.raises(NotApplicable, match="int64"):
        score(words, torch.zeros(1, 3, dtype=torch.long))


def test_in_a_loop_of_the_users_own_all_cuts_come_with_the_first_step():
    model, x = perceptron()
    schedule = {"name": "iterative", "steps": 10, "span": 0}
    options = {"method": "synflow", "budget": sc.Budget(sparsity=0.9), "schedule": schedule}
    expected = sc.prune(model, x, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, x, optimizers=sgd, total_steps=2, **options)
    for _ in range(2):
        sgd.zero_grad()
        F.mse_loss(model(x), torch.ones(1, 5)).backward()
        sgd.step()
        pruner.step()
        if pruner.steps == 1:
            assert all(torch.equal(t, expected.model.state_dict()[n]) for n, t in model.state_dict().items())
    assert pruner.done and len(pruner.rounds) == 10
