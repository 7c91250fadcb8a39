"""Integers that modules hold in containers: found wherever they lie, and rewritten without touching other holders."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure.provenance import (
    MOST_SETTINGS,
    Attribute,
    Listener,
    TracedInt,
    read_attribute,
    traced_attributes,
    write_attribute,
)

FORMS = {
    "pairs": lambda: (("parts", 4),),  # einops
    "dict": lambda: {"attention": {"parts": 4, "scale": 0.5}},
    "mixed": lambda: ["M", [4, None], {"x": 1}],
}
PLACES = {
    "pairs": Attribute("1", "settings.0", 1),
    "dict": Attribute("1", "settings.attention.parts"),
    "mixed": Attribute("1", "settings.1", 0),
}


class Split(nn.Module):
    """Sums over parts of a width; how many there are lies in a container."""

    def __init__(self, settings) -> None:
        super().__init__()
        self.settings = settings
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(3, 8)

    def parts(self):
        if isinstance(self.settings, dict):
            return self.settings["attention"]["parts"]
        return self.settings[0][1] if isinstance(self.settings, tuple) else self.settings[1][0]

    def forward(self, x):
        return self.down(self.up(x).unflatten(-1, (self.parts(), 3)).sum(-2))


@pytest.mark.parametrize("form", FORMS)
def test_sizes_in_containers_follow_a_cut(form, tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), Split(FORMS[form]()), nn.Linear(8, 3)).eval()

    model, x = build(), torch.randn(2, 5)
    structure = sc.trace(model, x)
    assert PLACES[form] in structure.attributes
    (parts,) = (axis for axis in structure.prunable if axis.size == 4)
    assert parts.name.startswith("1.up") and structure.verify(model).ok
    pruned = sc.prune(model, x, granularity="channel", scope={"include": ["1.up*"]}, budget=sc.Budget(macs=0.8))
    assert read_attribute(pruned.model, PLACES[form]) < 4 == read_attribute(model, PLACES[form])
    sc.save(pruned, tmp_path / "small.safetensors")
    assert torch.equal(sc.load(tmp_path / "small.safetensors", build)(x), pruned.model(x))


def test_other_holders_of_a_container_keep_it():
    shared = {"sizes": [3, 4]}
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    model[0].options = model[1].options = shared
    write_attribute(model, Attribute("0", "options.sizes", 1), 7)
    assert model[0].options == {"sizes": [3, 7]} and model[1].options is shared and shared == {"sizes": [3, 4]}


def test_containers_are_put_back_and_data_are_left_alone():
    model = nn.Linear(2, 2)
    model.settings = settings = {"a": [1, {"b": (2, "c")}], "x.y": 3, 4: 5}
    model.words = words = {str(i): i for i in range(MOST_SETTINGS + 1)}
    with traced_attributes(model, Listener()):
        number = model.settings["a"][1]["b"][0]
        assert isinstance(number, TracedInt) and number.expression == Attribute("", "settings.a.1.b", 0)
        assert type(model.settings["x.y"]) is type(model.settings[4]) is int  # no such path could be written
        assert model.words is words and model.settings == settings
    assert model.settings is settings and type(settings["a"][1]["b"][0]) is int
