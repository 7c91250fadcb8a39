from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.recipe import Recipe
from secateur.core.select import top_k
from secateur.core.slots import Scope
from secateur.errors import DataNeeded, InvalidRecipe
from secateur.methods.snip import Snip
from secateur.parts.granularity.weight import Weight
from secateur.testing.toys import TwoLayer


def network(bias=False, seed=0):
    torch.manual_seed(seed)
    sizes = [12, 10, 8, 5]
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def batches(n=3, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(9, 12, dtype=torch.float64), torch.randint(0, 5, (9,))) for _ in range(n)]


def score(criterion, model, data, **options):
    return criterion.score(sc.Context(Weight().units(model, data[0][0], Scope()), data, **options))


def test_scores_are_hand_computed():
    model = TwoLayer(torch.tensor([[1.0, -2.0], [-3.0, -1.0]]), torch.tensor([[3.0, 1.0]]))
    x, target = torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0]])
    # y = 3 relu(4 - 2) + relu(-12 - 1) = 6, L = y: theta g = 3 * (4, -2), the second unit is off
    units = Weight().units(model, x, Scope())
    found = Snip().score(sc.Context(units, [(x, target)], lambda output, _: output.sum()))
    assert found["hidden.weight"].tolist() == [[12, 6], [0, 0]] and found["head.weight"].tolist() == [[6, 0]]


def test_the_score_is_the_derivative_with_respect_to_a_factor_on_each_connection():
    model, data = network(bias=True), batches(1)
    factors = {n: torch.ones_like(p, requires_grad=True) for n, p in model.named_parameters() if p.dim() > 1}
    state = {n: p.detach() * factors.get(n, 1) for n, p in model.named_parameters()}
    F.cross_entropy(torch.func.functional_call(model, state, data[0][0]), data[0][1]).backward()
    for name, values in score(Snip(), model, data).items():
        torch.testing.assert_close(values, factors[name].grad.abs())


def test_signed_sums_are_equal_in_all_layers_of_a_network_without_biases():
    model, data = network(), batches()
    context = sc.Context(Weight().units(model, data[0][0], Scope()), data)
    signed = {name: weight * context.gradients()[name] for name, weight in context.weights.items()}
    for name, values in Snip().score(context).items():
        assert torch.equal(values, signed[name].abs())
    totals = torch.stack([values.sum() for values in signed.values()])
    torch.testing.assert_close(totals, totals[:1].expand(3), rtol=1e-10, atol=0)
    biased = score(Snip(), network(bias=True), data)
    assert len({round(float(values.sum()), 6) for values in biased.values()}) == 3


def test_sums_over_a_filter_vanish_where_batch_statistics_normalize_so_scores_are_read_in_eval_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, eps=1e-12), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    model.double()
    x, y = torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    (gradient,) = torch.autograd.grad(F.cross_entropy(copy.deepcopy(model)(x), y), model[0].weight, allow_unused=True)
    assert gradient is None  # the copy has weights of its own
    in_training = copy.deepcopy(model)
    F.cross_entropy(in_training(x), y).backward()
    assert (in_training[0].weight * in_training[0].weight.grad).flatten(1).sum(1).abs().max() < 1e-9
    units = Weight().units(model.train(), x, Scope())
    context = sc.Context(units, [(x, y)])
    assert (context.weights["0.weight"] * context.gradients()["0.weight"]).flatten(1).sum(1).abs().max() > 1e-4


def test_the_two_losses():
    model, data = network(), batches(1)
    x, y = data[0]
    (-model(x)[torch.arange(9), y].mean()).backward()
    found = score(Snip(loss="neg_logit"), model, data)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], (parameter * parameter.grad).abs())
    assert not torch.allclose(found["0.weight"], score(Snip(), model, data)["0.weight"])


def progressive_skeletonization(model, data, sparsity, steps):
    """Algorithm 1 of the paper, on masks beside the weights; returns the masks of all steps."""
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights.items()}
    total, history = sum(w.numel() for w in weights.values()), []
    target = round((1 - sparsity) * total)
    for step in range(1, steps + 1):
        other = copy.deepcopy(model)
        other.load_state_dict({n: w * masks[n] for n, w in weights.items()})
        # Sensitivities of the weights into and out of a unit with one of each are equal: round as the method does.
        gradients = sc.Context(Weight().units(other, data[0][0], Scope()), data).gradients()
        scores = {n: (weights[n] * gradient).abs() for n, gradient in gradients.items()}
        kept = target if step == steps else int((target / total) ** (step / steps) * total + 1e-9)
        masks = top_k(scores, kept)
        history.append(masks)
    return history


@pytest.mark.parametrize("steps", [1, 4])
def test_force_is_the_papers_algorithm_and_with_one_step_it_is_snip(steps):
    model, data = network(), batches()
    before = copy.deepcopy(model.state_dict())
    expected = progressive_skeletonization(model, data, 0.9, steps)
    options = {"method": "snip", "budget": sc.Budget(sparsity=0.9), "data": data}
    found = sc.prune(model, data[0][0], criterion={"name": "snip", "force": steps}, **options)
    assert all(torch.equal(found.masks[n], mask) for n, mask in expected[-1].items())
    assert all(torch.equal(found.model.state_dict()[n], w * found.masks[n]) for n, w in before.items())
    assert found.rounds[0].samples_used == steps * 27
    if steps == 1:
        assert all(torch.equal(m, found.masks[n]) for n, m in sc.prune(model, data[0][0], **options).masks.items())
    else:
        assert any((later & ~expected[0][n]).any() for later_masks in expected for n, later in later_masks.items())


def recorded(monkeypatch, owner, name, found):
    """What `found` makes of the arguments and the result of each call of a method."""
    method, history = getattr(owner, name), []

    def recording(*args):
        result = method(*args)
        history.append(found(*args, result))
        return result

    monkeypatch.setattr(owner, name, recording)
    return history


def revived(masks):
    """How many weights each mask keeps that the one before has removed."""
    return [sum(int((b[n] & ~a[n]).sum()) for n in b) for a, b in pairwise(masks)]


def test_iterative_snip_has_nested_masks_and_scores_what_is_left(monkeypatch):
    model, data = network(), batches()
    schedule = {"name": "iterative", "steps": 4, "span": 0}
    options = {"method": "snip", "data": data, "schedule": schedule}
    scored = recorded(
        monkeypatch, Snip, "score", lambda _, context, scores: {n: w != 0 for n, w in context.weights.items()}
    )
    tight = sc.prune(model, data[0][0], budget=sc.Budget(sparsity=0.9), **options)
    total, masks = 240, [*scored, tight.masks]
    assert [sum(int(m.sum()) for m in mask.values()) for mask in masks] == [total, *(r.cost for r in tight.rounds)]
    assert revived(masks) == [0, 0, 0, 0]
    assert [r.cost for r in tight.rounds] == [int(0.1 ** (i / 4) * total + 1e-9) for i in (1, 2, 3)] + [24]
    once = sc.prune(model, data[0][0], budget=sc.Budget(sparsity=0.9), method="snip", data=data)
    assert any(not torch.equal(m, once.masks[n]) for n, m in tight.masks.items())


def test_force_brings_weights_back(monkeypatch):
    model, data = network(), batches()
    masks = recorded(monkeypatch, sc.Context, "choose", lambda *call: call[-1])
    options = {"method": "snip", "data": data, "budget": sc.Budget(sparsity=0.9)}
    found = sc.prune(model, data[0][0], criterion={"name": "snip", "force": 4}, **options)
    counts = [sum(int(m.sum()) for m in mask.values()) for mask in masks]
    assert counts == [int(0.1 ** (i / 4) * 240 + 1e-9) for i in (1, 2, 3)]
    assert any(revived([*masks, found.masks]))


def test_mask_and_weights_come_from_init_although_a_trained_network_is_given():
    model, data = network(), batches()
    init = copy.deepcopy(model.state_dict())
    options = {"method": "snip", "budget": sc.Budget(sparsity=0.5), "data": data}
    fresh = sc.prune(model, data[0][0], **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))  # training, so to speak
    found = sc.prune(model, data[0][0], checkpoints={"init": init}, **options)
    assert all(torch.equal(fresh.model.state_dict()[n], t) for n, t in found.model.state_dict().items())


def test_in_a_loop_of_the_users_own():
    model, data = network(), batches()
    init = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    budget = sc.Budget(sparsity=0.5)
    expected = sc.prune(model, data[0][0], method="snip", budget=budget, data=data).masks
    pruner = sc.Pruner(model, data[0][0], optimizers=sgd, total_steps=3, method="snip", budget=budget, data=data)
    for i, (x, y) in enumerate(data):
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
        pruner.step()
        if i == 0:
            assert all(torch.equal(model.state_dict()[n], init[n] * m) for n, m in expected.items())
    assert all(not parameter[~expected[n]].any() for n, parameter in model.named_parameters())


def test_bad_requests_get_one_clear_error():
    model, data = network(), batches()
    with pytest.raises(DataNeeded):
        sc.prune(model, data[0][0], method="snip", budget=sc.Budget(sparsity=0.5))
    with pytest.raises(InvalidRecipe, match="only a pruning run"):
        score(Snip(force=2), model, data)
    with pytest.raises(InvalidRecipe, match="force"):
        Recipe(criterion={"name": "snip", "force": 0})
