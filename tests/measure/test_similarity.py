from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc
from secateur.errors import DataNeeded, InvalidInputs, NotApplicable, UnknownName
from secateur.measure.similarity import (
    Sketch,
    _projection,
    bures,
    centered,
    cka,
    distance,
    kernels,
    similarity,
    some_samples,
)
from secateur.testing.toys import toy, toy_batches


def gram(x):
    return x @ x.T


def features(n=20, d=7, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1


def test_a_kernel_is_like_itself():
    kernel = gram(features())
    assert cka(kernel, kernel) == pytest.approx(1, abs=1e-12) and bures(kernel, kernel) == pytest.approx(1, abs=1e-7)
    assert distance(kernel, kernel) == 0
    assert cka(kernel, torch.ones(20, 20, dtype=torch.float64)) == 0 == bures(torch.zeros(20, 20).double(), kernel)


@pytest.mark.parametrize("index", [cka, bures])
def test_rotations_scales_and_shifts_of_the_features_change_nothing(index):
    x, y = features(), features(d=4, seed=1)
    rotation = torch.linalg.qr(features(7, 7, 2)).Q
    expected = index(gram(x), gram(y))
    assert index(gram(3 * x @ rotation + 5), gram(y)) == pytest.approx(expected, abs=1e-9)
    assert 0 < expected < 1 and expected == pytest.approx(index(gram(y), gram(x)), abs=1e-9)
    stretched = x * torch.tensor([10.0, *[1] * 6], dtype=torch.float64)
    assert index(gram(stretched), gram(y)) != pytest.approx(expected, abs=1e-3)  # not every linear map


def test_samples_may_come_in_another_order():
    x, y, order = features(), features(d=4, seed=1), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for index in (cka, bures, distance):
        assert index(gram(x), gram(y)) == pytest.approx(index(gram(x[order]), gram(y[order])), abs=1e-9)


def test_closed_forms():
    """One feature each: the squared correlation, and its root. Centered kernels of orthogonal features: 0."""
    x, y = features(30, 1), features(30, 1, 1) + features(30, 1)
    r = float(torch.corrcoef(torch.cat([x, y], 1).T)[0, 1])
    assert cka(gram(x), gram(y)) == pytest.approx(r**2) and bures(gram(x), gram(y)) == pytest.approx(abs(r))
    a = torch.tensor([[1.0, -1, 1, -1]]).double().T
    b = torch.tensor([[1.0, 1, -1, -1]]).double().T
    assert cka(gram(a), gram(b)) == 0 and cka(gram(torch.cat([a, b], 1)), gram(a)) == pytest.approx(0.5**0.5)
    x = features()
    torch.testing.assert_close(centered(gram(x)), gram(x - x.mean(0)))
    assert distance(gram(a), gram(b)) == pytest.approx(float((gram(a) - gram(b)).norm()))


def test_kernels_with_gradients_are_those_of_outer_products():
    """K = gram of x gᵀ per sample, with g the derivative of sum of q log p, q fixed, by finite differences."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).double()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(6, 5, dtype=torch.float64)
    found = kernels(model, [x[:4], x[4:]], gradients=True)
    hidden = model[0](x)
    p = model[1:](hidden.clone()).softmax(-1)
    q = p.sqrt() / p.sqrt().sum(-1, keepdim=True)
    value = lambda h: (q * model[1:](h.clone()).log_softmax(-1)).sum(-1)  # noqa: E731
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    g = torch.stack([(value(hidden + s) - value(hidden - s)) / 2e-6 for s in step], 1)
    expected = gram(torch.einsum("ni,nj->nij", hidden, g).flatten(1))
    torch.testing.assert_close(found["0"], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(kernels(model, [x])["0"], gram(hidden))


def test_features_that_do_not_fit_are_computed_anew(monkeypatch):
    model, _ = toy("mlp")
    data = toy_batches("mlp")
    kept = kernels(model, data, gradients=True)
    monkeypatch.setattr("secateur.measure.similarity.REMEMBERED", 8 * (32 + 24 + 10) * 2)  # of one batch
    bounded = kernels(model, data, gradients=True)
    assert all(torch.equal(kept[name], kernel) for name, kernel in bounded.items())


@pytest.mark.parametrize("gradients", [False, True])
def test_batches_make_no_difference_and_the_model_is_left_as_it_was(gradients):
    model, _ = toy("resnet20")
    model.train()
    x = torch.cat([x for x, _ in toy_batches("resnet20", n=2)])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole, parts = (kernels(model, x.split(n), ["conv1", "blocks.4"], gradients=gradients) for n in (16, 7))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-4 * float(whole[name].abs().max()))
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules()) and model.conv1.weight.grad is None


def test_channels_in_another_order_change_nothing():
    model, _ = toy("mlp")
    other, _ = toy("mlp")
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        other[1].weight.copy_(model[1].weight[order])
        other[1].bias.copy_(model[1].bias[order])
        other[3].weight.copy_(model[3].weight[:, order])
    found = similarity(model, other, toy_batches("mlp"), gradients=True)
    assert all(value == pytest.approx(1, abs=1e-5) for value in found.of_same().values())


# ------------------------------------------------------------------------------------------------------- sketches


def test_a_projection_has_one_sign_in_each_part_and_keeps_inner_products_on_average():
    generator = torch.Generator().manual_seed(0)
    project = _projection(9, Sketch(rows=12, entries=3), generator)
    assert project.shape == (12, 9) and (project.view(3, 4, 9) != 0).sum(1).eq(1).all()
    torch.testing.assert_close(project.norm(dim=0), torch.ones(9, dtype=torch.float64))
    x = features(24, 5)
    mean = torch.stack([gram((_projection(24, Sketch(32), generator) @ x).T) for _ in range(2000)]).mean(0)
    assert float((mean - gram(x.T)).norm() / gram(x.T).norm()) < 0.03


def test_sketches_of_the_same_data_and_seed_can_be_compared():
    model, _ = toy("mlp")
    data = toy_batches("mlp", n=6)
    one, same = (kernels(model, data, sketch=Sketch(16), gradients=True)["1"] for _ in range(2))
    assert one.shape == (16, 16) and torch.equal(one, same)
    assert not torch.equal(one, kernels(model, data, sketch=Sketch(16, seed=1), gradients=True)["1"])
    assert cka(one, same) == pytest.approx(1)
    wide = kernels(model, data, sketch=Sketch(2000))["3"]
    other, _ = toy("mlp", seed=1)
    exact = similarity(model, other, data).of_same()["3"]
    assert cka(wide, kernels(other, data, sketch=Sketch(2000))["3"]) == pytest.approx(exact, abs=0.02)


# -------------------------------------------------------------------------------------------------------- pruning


def test_gradients_tell_how_much_of_a_network_is_gone_and_features_hardly():
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:900]), y[:900]).backward()
        optimizer.step()
    mean = {}
    for sparsity in (0.2, 0.5, 0.8):
        pruned = sc.prune(model, x[:1], budget=sc.Budget(sparsity=sparsity)).model
        for gradients in (False, True):
            same = similarity(model, pruned, [x[900:1200]], gradients=gradients).of_same()
            mean[sparsity, gradients] = sum(same.values()) / len(same)
    for gradients in (False, True):
        assert mean[0.2, gradients] > mean[0.5, gradients] > mean[0.8, gradients]
    assert all(mean[s, True] < mean[s, False] for s in (0.2, 0.5, 0.8))


def test_a_pruned_network_is_compared_in_its_report():
    model, x = toy("resnet20")
    data = toy_batches("resnet20")
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5))
    found = similarity(model, pruned.model, data)
    assert found.values.shape == (len(found.first), len(found.second)) and found.first == found.second
    assert all(0 <= value <= 1 for value in found.of_same().values())
    page = pruned.report(dense=model, data=data)
    least = min(found.of_same(), key=found.of_same().get)
    assert "Representations, layer by layer" in page and f"{least} the least" in page
    assert "Representations" not in pruned.report()


def test_networks_without_common_layers_are_compared_too():
    (one, _), (other, _) = toy("mlp"), toy("vit")
    data = [torch.randn(6, 3, 4, 4)]
    found = similarity(one, one, data, ["1"])
    assert found.first == found.second == ("1",) and some_samples(data * 9, 10) == data * 2
    shallow = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    assert similarity(one, shallow, data).values.shape == (3, 1)
    assert len(kernels(other, [torch.randn(2, 3, 16, 16)])) == 10


def test_what_cannot_be_compared_is_said():
    model, _ = toy("mlp")
    with pytest.raises(DataNeeded):
        kernels(model, [])
    with pytest.raises(UnknownName, match="Unknown layer '11'"):
        kernels(model, toy_batches("mlp"), ["11"])
    with pytest.raises(InvalidInputs, match="must divide"):
        kernels(model, toy_batches("mlp"), sketch=Sketch(10, 3))
    with pytest.raises(NotApplicable, match="A tuple passes the layer"):
        kernels(nn.Sequential(nn.LSTM(3, 4)), [torch.randn(2, 5, 3)], ["0"])
