"""Integers in objects that a model holds; configurations that tell the truth after a cut, or say that they cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure.inputs import state_of
from secateur.structure.settings import read_settings
from secateur.structure.surgery import NOTE, cut_copy, make_plan
from secateur.testing.oracle import oracle_error


@dataclass(frozen=True)
class Config:
    width: int = 16
    hidden: int = 32
    layers: int = 2
    steps: tuple[int, ...] = (8, 12)


class Net(nn.Module):
    """Two residual layers; `computed` is a number that the constructor derives."""

    def __init__(self, config, computed=None):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(6, config.width)
        self.up = nn.ModuleList(nn.Linear(config.width, config.hidden) for _ in range(config.layers))
        self.down = nn.ModuleList(nn.Linear(config.hidden, config.width) for _ in range(config.layers))
        self.tail = nn.Sequential(nn.Linear(config.width, config.steps[0]), nn.ReLU(), nn.Linear(config.steps[0], 3))
        self.remembered = config.width

    def forward(self, x):
        x = self.embed(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.tail(x)


class Scaled(Net):
    def __init__(self, config):
        super().__init__(config)
        self.scale = config.hidden**-0.5

    def forward(self, x):
        return super().forward(x) * self.scale


class Reading(Net):
    """Computes with its configuration each time it runs."""

    def forward(self, x):
        return super().forward(x) / self.config.hidden


class Rotary(Net):
    """Frequencies that no file holds, computed from a width."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("frequencies", torch.arange(config.width) / config.width, persistent=False)

    def forward(self, x):
        return self.tail(self.embed(x) * self.frequencies)


class Heads(nn.Module):
    """Widths that are products of fields; nothing states the number of heads alone."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.size = config.size
        self.project = nn.Linear(6, config.heads * config.size)
        self.out = nn.Linear(config.heads * config.size, 3)

    def forward(self, x):
        heads = self.project(x).view(*x.shape[:-1], -1, self.size)
        return self.out(heads.softmax(-1).flatten(-2))


def cut(model, x, **counts):
    """Cut axes down to their first units; returns what `prune` would: the small model and its plan."""
    structure, settings = sc.trace(model.eval(), x), read_settings(model)
    kept = {axis.name: torch.arange(axis.size) < counts.get(axis.name, axis.size) for axis in structure.prunable}
    assert counts.keys() <= kept.keys()
    plan = make_plan(structure, kept)
    small = cut_copy(model, plan)
    return small, plan if settings is None else settings.state(small, structure, plan)


def shapes(model):
    return {name: tensor.shape for name, tensor in state_of(model).items()}


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def test_a_configuration_states_uniform_widths_and_builds_the_network():
    config = Config()
    model = Net(config)
    small, plan = cut(model, X, **{"embed": 10, "up.0": 20, "up.1": 20})
    assert replace(small.config) == Config(width=10, hidden=20) and not plan.note
    assert small.remembered == 10  # read by nothing in forward, computed from the field
    assert shapes(Net(small.config)) == shapes(small)
    assert config == Config() and model.remembered == 16


class Strict(Config):
    """Knows a rule for its fields, as loaders check it."""

    def validate(self):
        if self.width % 4:
            raise ValueError("width must be a multiple of 4")


def test_a_configuration_that_breaks_its_own_rules_cannot_express_the_cut():
    small, plan = cut(Net(Strict()), X, **{"embed": 10, "up.0": 20, "up.1": 20})
    assert "cannot express it" in plan.note and NOTE in vars(small.config) and small.config.width == 16
    small, plan = cut(Net(Strict()), X, **{"embed": 8, "up.0": 20, "up.1": 20})
    assert not plan.note and small.config.width == 8


def test_places_in_tuples_are_fields_of_their_own():
    small, plan = cut(Net(Config()), X, **{"tail.0": 5})
    assert small.config.steps == (5, 12) and not plan.note


def test_a_field_whose_layers_differ_stays_and_a_note_says_so(tmp_path):
    torch.manual_seed(0)
    model = Net(Config())
    small, plan = cut(model, X, **{"embed": 10, "up.0": 20, "up.1": 30})
    assert (small.config.width, small.config.hidden) == (10, 32)
    note = vars(small.config)[NOTE]
    assert note == plan.note and "cannot express it" in note and "hidden: 20, 30" in note
    pruned = sc.prune(model, X, granularity="channel", budget=sc.Budget(macs=0.5))
    sc.save(pruned, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", build=lambda: Net(Config()))
    assert vars(again.config) == vars(pruned.model.config) and NOTE in vars(again.config)
    assert NOTE not in vars(model.config)


class Loadable(Config):
    """What loaders build from its fields computes one of them."""

    @property
    def depth(self):
        return self.layers

    @classmethod
    def loaded(cls, fields):
        config = cls()
        for name, value in fields.items():
            object.__setattr__(config, name, value)  # as setattr, for a configuration that is not frozen
        return config


def test_what_is_saved_of_a_configuration_that_cannot_express_the_cut_cannot_be_loaded():
    small, plan = cut(Net(Loadable()), X, **{"embed": 10, "up.0": 20, "up.1": 30})
    assert plan.note and small.config.depth == 2 and small(X).shape == (2, 3)
    with pytest.raises(AttributeError, match="depth"):
        Loadable.loaded(vars(small.config))
    small, plan = cut(Net(Loadable()), X, **{"embed": 10, "up.0": 20, "up.1": 20})
    assert not plan.note and shapes(Net(Loadable.loaded(vars(small.config)))) == shapes(small)


def test_products_of_fields_are_solved():
    model = Heads(SimpleNamespace(heads=6, size=4))
    structure = sc.trace(model, torch.randn(2, 5, 6))
    heads = next(axis.name for axis in structure.prunable if axis.size == 6)
    small, plan = cut(model, torch.randn(2, 5, 6), **{heads: 2})
    assert vars(small.config) == {"heads": 2, "size": 4} and not plan.note


def test_numbers_that_a_constructor_would_compute_anew_are_not_expressible():
    model = Scaled(Config())
    small, plan = cut(model, X, **{"up.0": 8, "up.1": 8})
    assert small.scale == 32**-0.5
    assert small.config.hidden == 32 and "cannot express it" in plan.note and "hidden: 8" in plan.note
    assert not {change.name for change in plan.attributes}  # a network with 8 would take the weights, and be wrong


def test_buffers_that_files_leave_out_must_be_whole():
    small, plan = cut(Rotary(Config(layers=0)), X, embed=10)
    assert small.config.width == 16 and "width: 10" in plan.note
    assert torch.equal(small.frequencies, torch.arange(10) / 16)


class Turned(nn.Module):
    """Heads whose size is computed, and a buffer of that size that no file holds, as partial rotary embeddings have."""

    def __init__(self, config):
        super().__init__()
        self.config, self.size = config, config.width // config.heads
        self.embed = nn.Linear(6, config.width)
        self.project = nn.Linear(config.width, config.heads * self.size)
        self.out = nn.Linear(config.heads * self.size, 3)
        self.register_buffer("frequencies", torch.arange(self.size) + 1.0, persistent=False)

    def forward(self, x):
        heads = self.project(self.embed(x)).view(*x.shape[:-1], -1, self.size)
        return self.out((heads * self.frequencies).flatten(-2))


def test_a_network_that_takes_the_weights_and_splits_them_otherwise_is_not_built():
    model = Turned(SimpleNamespace(width=16, heads=4))
    heads = next(axis.name for axis in sc.trace(model, X).prunable if ("project.weight", 0) in axis.members)
    small, plan = cut(model, X, **{"embed": 12, heads: 3})
    wrong = Turned(SimpleNamespace(width=12, heads=4))  # 12 = 3 x 4 here, 4 x 3 there
    assert {n: t.shape for n, t in wrong.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    assert plan.note and (small.config.width, small.config.heads) == (16, 4)


def test_a_configuration_that_the_network_computes_with_is_left_alone():
    torch.manual_seed(0)
    model = Reading(Config())
    small, plan = cut(model, X, **{"up.0": 8, "up.1": 8})
    assert small.config.hidden == 32 and "cannot express it" in plan.note
    assert oracle_error(model, small, plan, X) < 1e-10


@pytest.mark.parametrize("config", [None, "settings", {"width": 16}])
def test_models_that_cannot_be_built_from_what_they_keep_are_left_alone(config):
    model = Net(Config())
    model.config = config
    small, plan = cut(model, X, **{"up.0": 8, "up.1": 8})
    assert small.config == config and not plan.note and {c.name for c in plan.attributes} == set()


class Configured(nn.Module):
    """Reads the number of heads from its configuration whenever it runs, as many networks do."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.project, self.back = nn.Linear(16, config.heads * 4), nn.Linear(config.heads * 4, 16)

    def forward(self, x):
        heads = self.project(x).view(*x.shape[:-1], self.config.heads, 4)
        return x + self.back(heads.softmax(-1).flatten(-2))


def test_integers_in_shared_objects_tie_the_axes_that_they_are_the_size_of():
    torch.manual_seed(0)
    config = SimpleNamespace(inner=SimpleNamespace(heads=6))
    model = nn.Sequential(nn.Linear(6, 16), Configured(config.inner), Configured(config.inner), nn.Linear(16, 3)).eval()
    model.settings = config
    structure = sc.trace(model, torch.randn(2, 5, 6))
    assert sorted(map(len, structure.ties)) == [2] and type(config.inner.heads) is int
    pruned = sc.prune(model, torch.randn(2, 5, 6), granularity="channel", budget=sc.Budget(macs=0.5))
    assert pruned.model[1].config is pruned.model[2].config and pruned.model[1].config.heads < 6 == config.inner.heads


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.hidden = config, config.hidden
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Blocks(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.embed, self.head = config, nn.Linear(6, config.width), nn.Linear(config.width, 3)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_dropped_modules_remember_nothing():
    torch.manual_seed(0)
    config = Config(layers=3)
    deep = sc.prune(Blocks(config).eval(), X, granularity="depth", budget=sc.Budget(macs=0.75))
    assert deep.structure_plan.dropped and "cannot express it" in deep.structure_plan.note
    settings, structure, plan = read_settings(Blocks(config)), deep.structure, deep.structure_plan
    narrow = {axis.name: torch.arange(axis.size) < axis.size // 2 for axis in structure.prunable}
    both = make_plan(structure, narrow).model_copy(update={"dropped": plan.dropped})
    changes = settings.origins.changes(settings.origins.stated(structure, both), structure, both)
    remembering = {c.module for c in changes if c.name == "hidden"}
    assert remembering == {f"blocks.{i}" for i in range(3)} - {d.module for d in plan.dropped} != set()
