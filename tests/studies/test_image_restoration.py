"""The parts of the study of image restoration, on pictures that need no scikit-image."""

from __future__ import annotations

import base64
import math
import re
import struct
import sys
import zlib

import pytest
import torch

from secateur.errors import MissingDependency
from secateur.measure.figures import pictures_figure
from secateur.studies import image_restoration
from secateur.studies.image_restoration import (
    Generator,
    Problem,
    Restoration,
    _ratio,
    best_filter,
    damaged,
    largest_eigenvalue,
    photograph,
    restore,
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in (("SIZE", 16), ("WIDTH", 8), ("LAYERS", 2), ("STEPS", 40)):
        monkeypatch.setattr(image_restoration, name, value)


def scene():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 16), torch.linspace(0, 1, 16), indexing="ij")
    return torch.stack([rows, columns, (rows + columns) / 2])


def test_problems_and_their_measures_by_hand():
    picture = torch.full((3, 4, 4), 0.5)
    seen = torch.zeros(1, 4, 4)
    seen[:, :2] = 1
    problem = Problem(picture, picture * seen, seen)
    output = torch.full((3, 4, 4), 0.6)
    assert problem.residual(output) == pytest.approx(0.1)
    assert problem.psnr(output) == pytest.approx(20, abs=1e-4)
    assert problem.psnr(problem.restored(output)) == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)
    problems = damaged(scene(), 0)
    assert problems["denoising"].residual(scene()) == pytest.approx(0.1, rel=0.1)
    assert problems["inpainting"].residual(scene()) == 0
    assert float(problems["inpainting"].seen.mean()) == pytest.approx(0.25, abs=0.1)


def test_filters_fill_holes_of_a_constant_and_lessen_noise():
    constant = torch.full((3, 16, 16), 0.3)
    problem = damaged(constant, 0)["inpainting"]
    holes = Problem(constant, problem.data * problem.seen, problem.seen)
    assert torch.allclose(image_restoration._smoothed(holes, 1.7), constant, atol=1e-5)
    noisy = damaged(scene(), 0)["denoising"]
    assert noisy.psnr(best_filter(noisy)) > noisy.psnr(noisy.data) + 5


def test_the_largest_eigenvalue_is_that_of_the_jacobian(monkeypatch):
    monkeypatch.setattr(image_restoration, "SIZE", 8)
    net, seen = Generator(1.0, 0), (torch.arange(64).view(1, 8, 8) % 3 == 0).float()
    out, weights = (net() * seen).flatten(), list(net.parameters())
    rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in out]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    largest = float(torch.linalg.svdvals(jacobian)[0]) ** 2
    assert largest_eigenvalue(net, seen, iterations=100) == pytest.approx(largest, rel=1e-3)
    assert 0.8 * largest < largest_eigenvalue(net, seen) <= largest * (1 + 1e-4)


def test_the_factor_gives_back_what_a_mask_takes_of_the_signal(monkeypatch):
    monkeypatch.setattr(image_restoration, "LAYERS", 3)
    found = {}
    for p, factor in ((1.0, 1.0), (0.3, 1.0), (0.3, 0.3**-0.5)):
        sizes = []
        for seed in range(60):
            net, mask = Generator(factor, seed), torch.Generator().manual_seed(100 + seed)
            for kernel in net.kernels:
                kernel.data *= torch.rand(kernel.shape, generator=mask) < p
            sizes.append(float((net() - 0.5).detach().square().mean()))
        found[p, factor] = sum(sizes) / len(sizes)
    assert found[0.3, 0.3**-0.5] == pytest.approx(found[1.0, 1.0], rel=0.1)
    assert found[0.3, 1.0] < 0.3 * found[1.0, 1.0]


def test_descent_restores_and_a_network_without_weights_does_not():
    problem = damaged(scene(), 0)["denoising"]
    step = 0.5 / largest_eigenvalue(Generator(1.0, 0), problem.seen)
    dense, gone = (restore(problem, density, 1.0, step, 0) for density in (1.0, 0.0))
    assert len(dense.psnrs) == len(dense.residuals) == 5 and dense.psnrs[-1] > dense.psnrs[0] + 5
    assert torch.allclose(gone.picture, torch.tensor(0.5)) and len(set(gone.residuals)) == 1
    assert torch.equal(dense.picture, restore(problem, 1.0, 1.0, step, 0).picture)


def test_stops_and_their_ratios():
    restoration = Restoration([0.3, 0.2, 0.11, 0.12], [], torch.zeros(0))
    assert restoration.stop(0.11) == 20 and restoration.stop(0.1) is None
    assert _ratio([40, 30], [20, 30]) == 1.5 and _ratio([None, 30], [20, 30]) == math.inf
    assert math.isnan(_ratio([10], [None]))


def test_the_whole_study_on_a_scene_of_our_own(monkeypatch):
    monkeypatch.setattr(image_restoration, "photograph", lambda name: scene())
    monkeypatch.setattr(image_restoration, "DENSITIES", (0.2, 0.05))
    findings = image_restoration.run(0, lambda *_: None)
    assert len(findings.claims) == 3 and not math.isnan(findings.data["denoising coffee"]["psnr"]["dense"][-1])
    assert set(findings.data) == {
        f"{task} {name}" for task in ("denoising", "inpainting") for name in ("astronaut", "coffee")
    }
    shown = next(e.figure for e in findings.exhibits if e.title == "The pictures")
    assert shown.count("<img") == 4 * 8 and 'alt="Denoising: astronaut: true"' in shown
    assert len(findings.exhibits[-1].table.rows) == 7


def test_pictures_are_png_files():
    picture = torch.tensor([[[0.0, 1.0, 0.5]], [[1.0, 0.0, 0.5]], [[2.0, -1.0, 0.5]]])
    html = pictures_figure({"a <row>": {"one & two": picture}})
    assert 'alt="a &lt;row&gt;: one &amp; two"' in html
    png = base64.b64decode(re.search(r"base64,([^\"]*)", html)[1])
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", png[16:24]) == (3, 1)
    start = png.index(b"IDAT")
    length = struct.unpack(">I", png[start - 4 : start])[0]
    assert list(zlib.decompress(png[start + 4 : start + 4 + length])) == [0, 0, 255, 255, 255, 0, 0, 128, 128, 128]
    assert struct.unpack(">I", png[start + 4 + length : start + 8 + length])[0] == zlib.crc32(
        png[start : start + 4 + length]
    )


def test_without_scikit_image_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(MissingDependency, match=r"pip install 'secateur\[studies\]'"):
        photograph("coffee")
