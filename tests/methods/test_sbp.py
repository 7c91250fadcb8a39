from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.masks import Masks
from secateur.core.slots import Scope
from secateur.methods.sbp import Sbp
from secateur.parts.granularity.weight import Weight
from secateur.parts.repair.rescale import at_edge_of_chaos
from secateur.tasks import find_task
from secateur.tasks.networks import ResNet


def perceptron(widths, scale=1.0, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=scale * math.sqrt(2 / a))
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def variances(model, x):
    """The mean square of each layer's output."""
    found = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                found.append(float(x.square().mean()))
    return found


def batches(width, n=32):
    torch.manual_seed(1)
    return [(torch.randn(n, width), torch.randint(0, 10, (n,)))]


def test_the_energy_of_each_layer_or_unit_is_hand_computed():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    context = sc.Context(Weight().units(model, torch.zeros(1, 2), Scope()))
    # mean energy of the rows: (25 + 0) / 2, to be 2
    assert torch.allclose(at_edge_of_chaos(context, math.sqrt(2))["weight"], model.weight * 0.4)
    per_unit = at_edge_of_chaos(context, math.sqrt(2), "unit")["weight"]
    assert torch.allclose(per_unit, torch.tensor([[0.6, 0.8], [0.0, 0.0]]) * math.sqrt(2))


def test_a_mask_multiplies_the_variance_by_its_share_of_the_energy_and_rescaling_undoes_that():
    """Depth 50, half of the weights of each layer masked by magnitude (specification A 6, C6; C 5, i and ii)."""
    widths = (100,) * 51
    model, x = perceptron(widths), torch.randn(64, 100)
    options = {"method": "magnitude", "allocation": "uniform", "budget": sc.Budget(sparsity=0.5)}
    found = sc.prune(model, x, repair="rescale", **options)
    rescaled, masked = found.model, copy.deepcopy(model)
    Masks(masked, found.masks).apply()
    z = 0.6744897501960817  # half of |N(0, 1)| lies below it
    alpha = 1 - math.erf(z / math.sqrt(2)) + math.sqrt(2 / math.pi) * z * math.exp(-(z**2) / 2)
    for before, after in zip(model[::2], masked[::2], strict=True):
        share = float((after.weight.square().sum() / before.weight.square().sum()).detach())
        assert share == pytest.approx(alpha, abs=0.02)
    dense, cut, back = (variances(m, x)[-1] / variances(m, x)[0] for m in (model, masked, rescaled))
    assert cut < dense / 10 and dense / 3 < back < 3 * dense
    for layer in rescaled[::2]:
        assert float(layer.weight.detach().square().sum(1).mean()) == pytest.approx(2, rel=1e-5)


def test_scores_do_not_depend_on_the_scale_of_the_given_initialization():
    scores = []
    for scale in (1.0, 0.6):
        model = perceptron((12, 20, 20, 10), scale)
        with torch.no_grad():
            for layer in model[::2]:
                layer.bias.normal_(generator=torch.Generator().manual_seed(3))
        data = batches(12)
        scores.append(Sbp().score(sc.Context(Weight().units(model, data[0][0], Scope()), data)))
    for name, values in scores[0].items():
        torch.testing.assert_close(values, scores[1][name], rtol=1e-4, atol=1e-7)


def test_without_biases_the_order_of_sensitivities_at_the_edge_is_that_of_a_network_with_this_scale():
    model, data = perceptron((12, 20, 20, 10)), batches(12)
    units = Weight().units(model, data[0][0], Scope())
    at_edge = copy.deepcopy(model)
    with torch.no_grad():
        for layer in at_edge[::2]:
            layer.weight.mul_(math.sqrt(2) / layer.weight.square().sum(1).mean().sqrt())
    F.cross_entropy(at_edge(data[0][0]), data[0][1]).backward()
    for name, values in Sbp().score(sc.Context(units, data)).items():
        weight = at_edge.get_parameter(name)
        torch.testing.assert_close(values, (weight * weight.grad).abs(), rtol=1e-4, atol=1e-8)


def test_a_stable_residual_network_divides_each_branch_by_the_root_of_their_number():
    torch.manual_seed(0)
    model = ResNet(20, 4).eval()
    x = torch.randn(2, 1, 8, 8)
    context = sc.Context(Weight().units(model, x, Scope()))
    plain, stable = (at_edge_of_chaos(context, math.sqrt(2), stable=s) for s in (False, True))
    changed = sorted(stable.keys() - plain.keys())
    blocks = range(9)  # those beside a projection, too
    assert changed == sorted(f"blocks.{i}.bn2.{p}" for i in blocks for p in ("weight", "bias"))
    parameters = dict(model.named_parameters())
    for name in changed:
        assert torch.allclose(stable[name], parameters[name] / math.sqrt(len(blocks)))
    block = model.blocks[0]
    before = block.bn2(block.conv2(torch.ones(1, 4, 5, 5)))
    with torch.no_grad():
        block.bn2.weight.copy_(stable["blocks.0.bn2.weight"])
    torch.testing.assert_close(block.bn2(block.conv2(torch.ones(1, 4, 5, 5))), before / math.sqrt(len(blocks)))


def test_the_pruned_network_is_the_masked_initial_one_at_the_edge_of_chaos():
    model, data = perceptron((12, 20, 20, 10), scale=0.3), batches(12)
    found = sc.prune(model, data[0][0], method="sbp", budget=sc.Budget(sparsity=0.8), data=data)
    for name, mask in found.masks.items():
        before, after = model.get_parameter(name), found.model.get_parameter(name)
        assert float(after.detach().square().sum(1).mean()) == pytest.approx(2, rel=1e-5)
        ratio = (after / before)[mask]
        assert torch.allclose(ratio, ratio[0].expand_as(ratio)) and not after[~mask].any()


def digits_learned(repair):
    """Loss and accuracy on all training digits of a tanh perceptron of 32 layers at the edge, 90 % pruned by SNIP."""
    split = find_task("digits").splits.train
    x, y, sizes = split.inputs.flatten(1), split.targets, (576, *(31 * [100]), 10)
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # sigma_w = 1, sigma_b = 0: the edge of tanh
        nn.init.zeros_(layer.bias)
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]
    options = {"method": "snip", "budget": sc.Budget(sparsity=0.9), "data": [(x, y)]}
    found = sc.prune(model, x[:2], **options, **({"repair": repair} if repair else {}))
    net = found.model
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    Masks(net, found.masks).attach(optimizer)
    for _ in range(400):
        some = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[some]), y[some]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        output = net(x)
    return float(F.cross_entropy(output, y)), float((output.argmax(1) == y).float().mean())


@pytest.mark.slow
def test_a_deep_perceptron_trains_only_if_it_is_rescaled():
    """Specification C 5, iii, for tanh. Under ReLU, SNIP keeps paths of active units, and signals do not die out."""
    loss, accuracy = digits_learned(None)
    assert loss == pytest.approx(math.log(10), abs=0.01) and accuracy < 0.2
    loss, accuracy = digits_learned({"name": "rescale", "sigma_w": 1.0})
    assert loss < math.log(10) / 2 and accuracy > 0.5


def test_in_a_loop_of_the_users_own():
    model, data = perceptron((12, 20, 10)), batches(12)
    budget = sc.Budget(sparsity=0.5)
    expected = sc.prune(model, data[0][0], method="sbp", budget=budget, data=data).model.state_dict()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = sc.Pruner(model, data[0][0], optimizers=sgd, total_steps=1, method="sbp", budget=budget, data=data)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    sgd.step()
    pruner.step()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())
