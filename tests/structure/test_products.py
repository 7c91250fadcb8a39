"""A trace that leaves out the products of layers says what one with all numbers says, or notices that it cannot."""

from __future__ import annotations

import importlib

import pytest
import torch
from tests.structure.mutation.judge import text_of
from torch import nn

import secateur as sc
from secateur.structure.inputs import as_inputs
from secateur.testing.toys import NETWORKS, toy

tracing = importlib.import_module("secateur.structure.trace")  # the package has a function of that name


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_both_traces_say_the_same(name, layout):
    model, x = toy(name)
    if x.dim() == 4:
        model, x = model.to(memory_format=layout), x.to(memory_format=layout)
    light, full = (tracing._traced(model, as_inputs(x), leave_out=choice) for choice in (True, False))
    assert light is not None and text_of(light) == text_of(full) and light.reasons == full.reasons


class Looking(nn.Module):
    """Its code looks at what a layer returns, in one way or another."""

    def __init__(self, look):
        super().__init__()
        self.a, self.b, self.look = nn.Linear(5, 8), nn.Linear(8, 2), look

    def forward(self, x):
        hidden = self.a(x)
        return self.b(hidden.relu() if self.look(hidden.abs()) else hidden.sigmoid())


def _through_a_cache(hidden):
    cache = torch.zeros(10, 8)
    cache[2:6] = hidden
    return float(cache[3:].sum()) > 0


LOOKS = {
    "item": lambda hidden: hidden.sum().item() > 0,
    "bool": lambda hidden: bool((hidden > 0).any()),
    "list": lambda hidden: hidden.flatten().tolist()[0] > 0,
    "numpy": lambda hidden: hidden.numpy().sum() > 0,
    "nonzero": lambda hidden: len(hidden.nonzero()) > 0,
    "mask": lambda hidden: hidden[hidden > 0].numel() > 0,
    "equal": lambda hidden: not torch.equal(hidden, torch.zeros_like(hidden)),
    "through a cache": _through_a_cache,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_code_that_looks_at_values_sees_the_real_ones(look):
    model, x = Looking(look).eval(), torch.randn(4, 5)
    assert tracing._traced(model, as_inputs(x), leave_out=True) is None
    operations = [name for name, _ in sc.trace(model, x).path]
    assert operations == [name for name, _ in tracing._traced(model, as_inputs(x), leave_out=False).path]


def test_looking_at_the_inputs_alone_needs_no_products():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 5)

        def forward(self, x):
            y = self.a(x) * x
            return self.a(y if x.abs().sum() > 0 else y + 1)

    assert tracing._traced(Checked().eval(), as_inputs(torch.randn(4, 5)), leave_out=True) is not None


class InPlace(nn.Module):
    """Adds a product to what a layer has computed, in its place; computed for the sake of a number that is read."""

    def __init__(self, read, batched) -> None:
        super().__init__()
        self.a, self.w, self.head = nn.Linear(4, 8), nn.Parameter(torch.randn(4, 8)), nn.Linear(8, 3)
        self.read, self.batched = read, batched

    def forward(self, x):
        y = self.a(x)
        y = y[None].baddbmm_(x[None], self.w[None])[0] if self.batched else y.addmm_(x, self.w)
        if self.read and bool(y.sum() > 1e9):
            y = y * 1
        return self.head(y)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_a_product_that_is_added_in_place_has_the_units_of_both(read, batched):
    model = InPlace(read, batched).eval()
    structure = sc.trace(model, torch.randn(3, 4))
    (axis,) = structure.prunable
    assert set(axis.members) == {("a.weight", 0), ("a.bias", 0), ("w", 1), ("head.weight", 1)}
    assert structure.verify(model).ok
