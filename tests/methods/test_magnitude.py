from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur.core.slots import Scope
from secateur.methods.magnitude import Magnitude
from secateur.parts.granularity.channel import Channel
from secateur.parts.granularity.weight import Weight
from secateur.testing.toys import TwoLayer

W = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
A = torch.tensor([[2.0, 6.0]])


def context(granularity):
    return sc.Context(granularity.units(TwoLayer(W, A).eval(), torch.randn(1, 2), Scope()))


def test_single_weights_are_scored_by_their_size_for_every_p():
    for p in (1, 2):
        scores = Magnitude(p=p).score(context(Weight()))
        assert scores["hidden.weight"].tolist() == [[3, 4], [0, 1]] and scores["head.weight"].tolist() == [[2, 6]]


def test_channels_are_scored_by_the_norm_of_all_their_weights_relative_to_the_mean():
    l1 = Magnitude(p=1).score(context(Channel()))["hidden"]
    assert torch.allclose(l1, torch.tensor([9.0, 7.0]) / 8)
    l2 = Magnitude(p=2).score(context(Channel()))["hidden"]
    norms = torch.tensor([29.0, 37.0]).sqrt()
    assert torch.allclose(l2, norms / norms.mean())


class Powers(TorchDispatchMode):
    """Counts how often entries are raised to a power, in place or not."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket._qualified_op_name in ("aten::pow", "aten::pow_")
        return func(*args, **(kwargs or {}))


def test_the_powers_of_each_weight_are_worked_out_once():
    for p in (2, 3):
        scored = context(Channel())
        with Powers() as powers:
            Magnitude(p=p).score(scored)
        of_norms = len(scored.units.shapes)  # each group's p-th root
        assert powers.count == len(scored.weights) + of_norms


def test_global_and_per_layer_allocation_differ_as_they_should():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 17).view(4, 4))
        model[1].weight.copy_(100 * torch.arange(1.0, 17).view(4, 4))
    x, budget = torch.randn(1, 4), sc.Budget(sparsity=0.5)
    everywhere = sc.prune(model, x, method="magnitude", budget=budget).masks
    assert not everywhere["0.weight"].any() and everywhere["1.weight"].all()
    each = sc.prune(model, x, method="magnitude", allocation="uniform", budget=budget).masks
    for name in ("0.weight", "1.weight"):
        assert torch.equal(each[name], (torch.arange(16) >= 8).view(4, 4))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.mix = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat))

    def forward(self, x):
        return self.b((self.a(x).to(torch.cfloat) @ self.mix).real)


def test_complex_weights_count_by_their_size():
    units = Channel().units(Complex().eval(), torch.randn(3, 4), Scope())
    a, b = (Magnitude(p=p).score(sc.Context(units)) for p in (2, 2 + 1e-9))
    assert a and all(not a[name].is_complex() and torch.allclose(a[name], b[name]) for name in a)
