from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.slots import Scope
from secateur.errors import NotApplicable
from secateur.methods.scop import Knockoffs, Scop
from secateur.parts.gates import Gates
from secateur.parts.granularity.channel import Channel
from secateur.testing.toys import toy, toy_batches


def channels(model, x):
    return Channel().units(model, x, Scope())


def test_knockoffs_have_the_moments_of_the_images_and_none_in_common_with_them():
    """Swapping a principal component of the images with that of the knockoffs leaves all second moments as they are."""
    torch.manual_seed(0)
    n, mixing = 200_000, torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(n, 4, dtype=torch.float64) @ mixing + torch.tensor([1.0, -2.0, 0.0, 3.0])
    knockoffs = Knockoffs(x.view(n, 1, 2, 2)).draw(x.view(n, 1, 2, 2), torch.Generator().manual_seed(1))
    assert knockoffs.shape == (n, 1, 2, 2)
    k = knockoffs.flatten(1)
    size = x.std(0)
    assert ((k.mean(0) - x.mean(0)).abs() < 4 * size / n**0.5).all()
    vectors = torch.linalg.eigh(torch.cov(x.T)).eigenvectors
    a, b = ((z - x.mean(0)) @ vectors for z in (x, k))
    scale = torch.cat([a.std(0), a.std(0)])
    together = torch.cov(torch.cat([a, b], 1).T)
    for swapped in (0, 2):
        other = together.clone()
        order = torch.arange(8)
        order[[swapped, swapped + 4]] = order[[swapped + 4, swapped]]
        other = together[order][:, order]
        # The difference of two variances has a standard error of 2 sigma² / sqrt(n); three of them.
        assert ((together - other).abs() < 6 * scale[:, None] * scale / n**0.5).all()


def test_the_slope_of_a_beta_is_the_gradient_times_the_difference_from_the_knockoff():
    """By finite differences in float64 (specification C1)."""
    model, x = toy("resnet20")
    model = model.double()
    ((images, target),) = toy_batches("resnet20", n=1)
    images, controls = images.double(), torch.randn_like(images, dtype=torch.float64)
    units = channels(model, x.double())
    gates = Gates(units)
    betas = {g: torch.full(s, 0.5, dtype=torch.float64, requires_grad=True) for g, s in units.shapes.items()}

    def loss():
        with gates.mixed(betas, lambda: model(controls)):
            output = model(images)
        assert len(output) == len(images)
        return nn.functional.cross_entropy(output, target)

    slopes = dict(zip(betas, torch.autograd.grad(loss(), list(betas.values())), strict=True))
    for group in ("conv1", "blocks.8.conv1"):
        found = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                betas[group][3] += step
                found.append(float(loss()))
                betas[group][3] -= step
        assert float(slopes[group][3]) == pytest.approx((found[0] - found[1]) / 2e-5, rel=1e-4, abs=1e-9)


def test_a_unit_that_equals_its_knockoff_has_no_slope_and_betas_of_one_change_nothing():
    model, x = toy("mlp")
    ((images, target),) = toy_batches("mlp", n=1)
    gates, shapes = Gates(channels(model, x)), {"1": (32,), "3": (24,)}
    betas = {g: torch.full(s, 0.5, requires_grad=True) for g, s in shapes.items()}
    with gates.mixed(betas, lambda: model(images)):
        loss = nn.functional.cross_entropy(model(images), target)
    assert all(not slope.any() for slope in torch.autograd.grad(loss, list(betas.values())))
    controls = torch.randn_like(images)
    with gates.mixed({g: torch.ones(s) for g, s in shapes.items()}, lambda: model(controls)):
        torch.testing.assert_close(model(images), model(images[:8]))
        mixed = model(images)
    torch.testing.assert_close(mixed, model(images))
    with gates.mixed({g: torch.zeros(s) for g, s in shapes.items()}, lambda: model(controls)):
        alone = model(images)
    torch.testing.assert_close(alone, model(controls))


def test_kappa_is_one_for_information_zero_for_noise_and_minus_one_for_what_misleads():
    """One feature tells the label, one is pure noise, one tells the label and is read with the wrong sign."""
    torch.manual_seed(0)
    y = torch.randint(0, 2, (2048,))
    x = torch.randn(2048, 3)
    x[:, [0, 2]] += (2.0 * y - 1)[:, None]
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[1].weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [1.5, 1.5, -1.0]]))
    context = sc.Context(channels(model, x[:1]), list(zip(x.split(256), y.split(256), strict=True)))
    kappa = Scop(epochs=40, lr=0.01).kappas(context)["0"]
    assert kappa[0] > 0.9 and kappa[2] < -0.9 and abs(kappa[1]) < 0.15
    assert context.batches_used == 41 * 8


def test_scores_are_kappas_times_the_scales_or_else_the_norms():
    model, x = toy("resnet20")
    data = toy_batches("resnet20", n=2)
    units, scop = channels(model, x), Scop(epochs=2)
    kappas, scores = (f(sc.Context(units, data)) for f in (scop.kappas, scop.score))
    inner = "blocks.2.conv1"
    torch.testing.assert_close(scores[inner], model.blocks[2].bn1.weight.abs() * kappas[inner])
    layers = [*(model.blocks[i].bn2 for i in (6, 7, 8)), model.blocks[6].shortcut[1]]
    stream = torch.stack([layer.weight.abs() for layer in layers]).mean(0)
    torch.testing.assert_close(scores["blocks.6.conv2"], stream * kappas["blocks.6.conv2"])
    plain, x = toy("mlp")
    units, data = channels(plain, x), toy_batches("mlp", n=2)
    kappas, scores = (f(sc.Context(units, data)) for f in (scop.kappas, scop.score))
    norms = (plain[1].weight.square().sum(1) + plain[1].bias.square() + plain[3].weight.square().sum(0)).sqrt()
    torch.testing.assert_close(scores["1"], norms * kappas["1"])


def test_inputs_that_are_no_images_are_refused():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    tokens = torch.randint(0, 9, (5,))
    with pytest.raises(NotApplicable, match="one tensor of real numbers"):
        Scop().score(sc.Context(channels(model, tokens), [(tokens, torch.zeros(5).long())]))
