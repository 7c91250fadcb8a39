"""A wrong analysis must not pass, and a wrong cut must not pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.structure import rules
from secateur.structure.dims import leaf
from secateur.structure.inputs import Inputs, relative_error, state_of
from secateur.structure.masked import run_masked
from secateur.structure.prove import half_of_each, prove_cut, proved_structure, proved_with_the_analysis
from secateur.structure.tracer import OpCall
from secateur.structure.verify import Outputs, permuted, random_cycle, redraw, told_apart
from secateur.testing.toys import toy


def _forget_to_unify(call: OpCall) -> None:
    """A broken rule: the result has axes of its own."""
    for tensor in call.results:
        call.tracer.set(tensor, [leaf(size) for size in tensor.shape])


def _swap_last_two(original):
    def broken(call: OpCall) -> None:
        original(call)
        dims = call.tracer.dims(call.out)
        if len(dims) > 1 and dims[-1].size == dims[-2].size:
            call.tracer.set(call.out, [*dims[:-2], dims[-1], dims[-2]])

    return broken


@pytest.mark.parametrize(
    ("operation", "network"),
    [
        ("add", "resnet20"),
        ("relu", "resnet20"),
        ("native_batch_norm", "resnet20"),
        ("mean", "resnet20"),
        ("mul", "squeeze_excite"),
        ("cat", "densenet"),
        ("avg_pool2d", "densenet"),
        ("hardswish", "mobilenet"),
        ("view", "vit"),
        ("native_layer_norm", "vit"),
        ("permute", "vit"),
        ("unbind", "vit"),
        ("gelu", "mlp"),
        ("native_group_norm", "grouped"),
    ],
)
def test_a_rule_that_forgets_is_caught_by_permutation(monkeypatch, operation, network):
    monkeypatch.setitem(rules.all_rules(), operation, _forget_to_unify)
    model, x = toy(network)
    structure = sc.trace(model, x)
    verification = structure.verify(model)
    assert not verification.ok and verification.failed
    assert proved_with_the_analysis(model, structure, half_of_each_axis(structure)) is None


def half_of_each_axis(structure):
    return half_of_each(structure, [axis.name for axis in structure.prunable], 0)


def test_a_rule_that_swaps_dims_is_caught(monkeypatch):
    monkeypatch.setitem(rules.all_rules(), "mm", _swap_last_two(rules.all_rules()["mm"]))
    monkeypatch.setitem(rules.all_rules(), "addmm", _swap_last_two(rules.all_rules()["addmm"]))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    verification = sc.trace(model, torch.randn(8, 6)).verify(model)
    assert not verification.ok


def test_only_the_culprits_are_named(monkeypatch):
    model, x = toy("vit")
    monkeypatch.setitem(rules.all_rules(), "gelu", _forget_to_unify)
    failed = sc.trace(model, x).verify(model).failed
    assert all("mlp" in name for name in failed) and len(failed) == 4  # both sides of two perceptrons
    assert set(failed.values()) == {"permuting it changed the output"}


def test_axes_that_fail_are_frozen_and_the_rest_is_cut(monkeypatch):
    model, x = toy("vit")
    monkeypatch.setitem(rules.all_rules(), "gelu", _forget_to_unify)
    structure = proved_structure(model, x)
    assert structure.prunable and all("mlp" not in axis.name for axis in structure.prunable)
    assert "permuting it changed the output" in structure.axis("blocks.0.mlp.0").reason


def test_a_cut_of_a_hidden_number_is_refused():
    """The code uses the width in a way that no trace sees; the masked network does not, so the proof fails."""

    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.a(x)
            return self.c(self.b(hidden * len(hidden[0])))

    model, x = Sneaky().eval(), torch.randn(2, 5)
    naive = sc.trace(model, x)
    assert {a.name for a in naive.prunable} == {"a", "b"}
    assert not prove_cut(model, naive, {"a": torch.arange(8) < 4}).ok
    assert prove_cut(model, naive, {"b": torch.arange(6) < 4}).ok
    assert permuted(model, naive).ok  # another order of the units has the same number of them
    verification = naive.verify(model)
    assert not verification.ok and verification.max_error > 0.1
    assert verification.failed == {"a": "a trial cut could not be proved equal to the masked network"}
    structure = proved_structure(model, x)
    assert [axis.name for axis in structure.prunable] == ["b"]
    assert "could not be proved" in structure.axis("a").reason


def test_a_wrong_plan_is_caught_by_the_proof():
    """Cutting other units than the mask says must not pass: the two sides are computed independently."""
    model, x = toy("resnet20")
    structure = sc.trace(model, x)
    axis = structure.prunable[1]
    kept, other = torch.arange(axis.size) < axis.size // 2, torch.arange(axis.size) >= axis.size // 2
    state = redraw(model, structure, torch.float64)
    inputs = structure.inputs.to(torch.float64)
    with torch.no_grad():
        a = run_masked(model, structure, {axis.name: kept}, state, inputs)
        b = run_masked(model, structure, {axis.name: other}, state, inputs)
    assert relative_error(a, b) > 1e-3


def test_dead_code_paths_do_not_fool_the_proof_of_value_dependent_control_flow():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

        def forward(self, x):
            hidden = self.a(x)
            hidden = hidden.relu() if hidden.sum() > 0 else hidden.sigmoid().exp()
            return self.b(hidden)

    model, x = Branching().eval(), torch.randn(4, 5)
    structure = proved_structure(model, x)
    for axis in structure.prunable:  # whatever is left free must be provable
        assert prove_cut(model, structure, {axis.name: torch.arange(axis.size) < 4}).ok


def test_restricted_layer_norm_has_the_closed_form():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.norm(self.a(x)))

    model = Net().double().eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    structure = sc.trace(model, x)
    kept = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    with torch.no_grad():
        found = run_masked(model, structure, {"a": kept}, state_of(model), Inputs((x,), {}))
        hidden = F.linear(x, model.a.weight[kept], model.a.bias[kept])
        normed = F.layer_norm(hidden, (4,), model.norm.weight[kept], model.norm.bias[kept])
        expected = F.linear(normed, model.b.weight[:, kept], model.b.bias)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("reduce", "small"),
    [
        (lambda h: h.mean(1, keepdim=True), lambda h: h.mean(1, keepdim=True)),
        (lambda h: h.amax(1, keepdim=True), lambda h: h.amax(1, keepdim=True)),
        (lambda h: h.softmax(1), lambda h: h.softmax(1)),
        (lambda h: h.var(1, keepdim=True), lambda h: h.var(1, keepdim=True)),
        (lambda h: h.std(1, keepdim=True, unbiased=False), lambda h: h.std(1, keepdim=True, unbiased=False)),
        (lambda h: torch.linalg.vector_norm(h, dim=1, keepdim=True), lambda h: h.pow(2).sum(1, keepdim=True).sqrt()),
        (lambda h: h.logsumexp(1, keepdim=True), lambda h: h.exp().sum(1, keepdim=True).log()),
        (lambda h: F.rms_norm(h, h.shape[1:]), lambda h: h / (h.pow(2).mean(1, keepdim=True) + 2.3e-16).sqrt()),
    ],
    ids=["mean", "amax", "softmax", "var", "std", "norm", "logsumexp", "rms_norm"],
)
def test_statistics_over_a_cut_axis_are_restricted_to_the_kept_units(reduce, small):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = self.a(x)
            return self.b(hidden * reduce(hidden))

    model = Net().double().eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    structure = proved_structure(model, x)
    assert [axis.name for axis in structure.prunable] == ["a"], [a.reason for a in structure.axes]
    kept = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    with torch.no_grad():
        found = run_masked(model, structure, {"a": kept}, state_of(model), Inputs((x,), {}))
        hidden = F.linear(x, model.a.weight[kept], model.a.bias[kept])
        expected = F.linear(hidden * small(hidden), model.b.weight[:, kept], model.b.bias)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_frozen_spreads_over_ties():
    axes = proved_structure(*toy("mlp")).axes
    structure = dataclasses.replace(proved_structure(*toy("mlp")), ties=(("1", "3"),))
    frozen = structure.frozen({"1": "because"})
    assert not frozen.prunable and "must stay as long as 1" in frozen.axis("3").reason and not frozen.ties
    assert len(axes) == len(frozen.axes)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_two_narrow_axes_that_are_one_are_told_apart(monkeypatch, width):
    """Two units have one order that is not their own, three have two: by chance both halves of an axis agree."""
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2))
    sound = sc.trace(model.eval(), torch.randn(3, 5))
    monkeypatch.setitem(rules.all_rules(), "relu", _forget_to_unify)
    broken = sc.trace(model, torch.randn(3, 5))
    assert [len(structure.prunable) for structure in (sound, broken)] == [2, 3]
    for seed in range(8):
        assert sound.verify(model, seed).ok
        verification = broken.verify(model, seed)
        assert not verification.ok and set(verification.failed) == {"0", "2:1"}


@pytest.mark.parametrize("narrow", [0, 1, 2, 3, 7, 8, 15, 40])
def test_of_two_neighbours_among_narrow_axes_one_is_permuted_without_the_other(narrow):
    names = [f"{i}" for i in range(narrow)]
    groups = told_apart(names)
    of = [tuple(name in group for group in groups) for name in names]
    assert all(map(any, of)) and len(groups) == min(narrow, 15).bit_length()
    for start in range(narrow):
        assert len(set(of[start : start + 15])) == min(15, narrow - start)


def test_no_unit_keeps_its_place_when_an_axis_is_permuted():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 3, 10):
        order = random_cycle(size, generator)
        assert sorted(order.tolist()) == list(range(size))
        assert size == 1 or not bool((order == torch.arange(size)).any())


class Chaotic(nn.Module):
    """Amplifies any difference, rounding too, layer by layer, unless the scales are well below 1."""

    def __init__(self, depth=60):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(depth))
        self.scales = nn.ParameterList(torch.ones(8) for _ in range(depth))

    def forward(self, x):
        for layer, scale in zip(self.layers, self.scales, strict=True):
            x = torch.sin(1.8 * scale * layer(x))
        return x


def test_a_network_that_amplifies_rounding_is_judged_where_it_does_not():
    model, x = Chaotic().eval(), torch.randn(4, 8)
    structure = sc.trace(model, x)
    names = [axis.name for axis in structure.prunable]
    assert Outputs(model, structure, 0).error_with(names, torch.float32) > 1e-3
    verification = permuted(model, structure)
    assert verification.ok and verification.max_error < 1e-10 and len(names) == 59
    assert structure.verify(model).ok
    wrong = structure.tensors["scales.0"]
    structure.tensors["scales.0"], structure.tensors["scales.1"] = structure.tensors["scales.1"], wrong
    assert not permuted(model, structure).ok and not structure.verify(model).ok


class Mixed(nn.Module):
    """Sums up units in their order, which no cut shows: absent units add nothing."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(5, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.second(self.first(x).cumsum(-1))


def test_a_trial_cut_in_another_order_shows_what_a_cut_does_not(monkeypatch):
    def sums_units_whatever_their_order(call: OpCall) -> None:
        call.tracer.consume("self", call["self"], [1])
        call.tracer.follow(call.out, call["self"], call.tracer.dims(call["self"]))

    monkeypatch.setitem(rules.all_rules(), "cumsum", sums_units_whatever_their_order)
    model, x = Mixed(16).eval(), torch.randn(3, 5)
    structure = sc.trace(model, x)
    assert prove_cut(model, structure, half_of_each(structure, ["first"], 0)).ok
    assert not structure.verify(model).ok
    assert proved_with_the_analysis(model, structure, half_of_each_axis(structure)) is None
    assert not proved_structure(model, x).prunable


@pytest.mark.parametrize("width", [2, 3, 7, 8])
@pytest.mark.parametrize("keep", [1, 2, 8])
def test_a_cut_proves_the_analysis_of_narrow_axes_too(monkeypatch, width, keep):
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, 2)).eval()
    sound = sc.trace(model, torch.randn(3, 5))
    assert [axis.size for axis in sound.prunable] == [width, 9]
    monkeypatch.setitem(rules.all_rules(), "relu", _forget_to_unify)
    broken = sc.trace(model, torch.randn(3, 5))
    assert len(broken.prunable) == 4
    for seed in range(4):
        proof, wrong = (
            proved_with_the_analysis(
                model, structure, {axis.name: torch.arange(axis.size) < keep for axis in structure.prunable}, seed
            )
            for structure in (sound, broken)
        )
        assert proof is not None and proof.ok and 0 <= proof.max_error < 1e-5
        assert wrong is None  # the same units of both halves stay


@pytest.mark.parametrize(("keep", "broken"), [(8, (0, 1)), (1, (1, 2))])
def test_every_pair_of_narrow_axes_is_told_apart_beside_a_cut(keep, broken):
    """Whole axes of four units have one of six orders; single units have none, and not every group does."""
    model = nn.Sequential(*(layer for n in (4, 4, 4) for layer in (nn.Linear(9, n), nn.Linear(n, 9)))).eval()
    structure = sc.trace(model, torch.randn(3, 9))
    narrow = [axis for axis in structure.prunable if axis.size == 4]
    first, second = (narrow[i] for i in broken)
    name = next(tensor for tensor, position in second.members if position == 1)
    wrong = {**structure.tensors, name: (structure.tensors[name][0], first.leaf)}
    mistaken = dataclasses.replace(structure, tensors=wrong)
    kept = {axis.name: torch.arange(axis.size) < (keep if axis.size == 4 else 9) for axis in structure.prunable}
    for seed in range(30):
        assert proved_with_the_analysis(model, mistaken, kept, seed) is None
    assert proved_with_the_analysis(model, structure, kept) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_parameters_are_redrawn_alike_in_all_but_values(dtype):
    layers = [nn.Linear(400, 400), nn.Linear(400, 400), nn.Conv2d(64, 256, 3).to(memory_format=torch.channels_last)]
    model = nn.ModuleList(layers)
    model[0].weight.requires_grad_(False)
    state = redraw(model, Structured({name for name, _ in model.named_parameters()}), dtype)
    for name, parameter in model.named_parameters():
        drawn = state[name]
        assert (drawn.shape, drawn.stride(), drawn.dtype) == (parameter.shape, parameter.stride(), dtype)
        assert drawn.requires_grad == parameter.requires_grad and drawn.is_leaf and not drawn._is_view()
    one, other, kernel = (state[f"{i}.weight"].detach() for i in range(3))
    assert len(torch.cat([one, other]).unique(dim=0)) == 800  # no two rows are alike, nor columns
    assert len(torch.cat([one, other], 1).unique(dim=1).T) == 800
    for weight, fan_in in ((one, 400), (kernel, 64 * 9)):
        assert weight.std() * fan_in**0.5 == pytest.approx(1, abs=0.02)


class Structured:
    """What `redraw` asks of a structure."""

    def __init__(self, parameters):
        self.parameters = parameters


def test_a_deep_residual_stack_is_verified_in_float32():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *(module for _ in range(3) for module in (nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
            )

        def forward(self, x):
            return x + self.layers(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), *(Block() for _ in range(192)), nn.Conv2d(8, 2, 1)).eval()
    structure = sc.trace(model, torch.randn(1, 3, 4, 4))
    names = [axis.name for axis in structure.prunable]
    assert Outputs(model, structure, 0).error_with(names, torch.float32) < 1e-5
    first, second = "1.layers.1.weight", "1.layers.4.weight"  # the earliest mistake still shows
    structure.tensors[first], structure.tensors[second] = structure.tensors[second], structure.tensors[first]
    assert Outputs(model, structure, 0).error_with(names, torch.float32) > 1e-3


def test_a_trial_cut_keeps_an_odd_number_of_units_where_it_can():
    model = nn.Sequential(*(layer for n in (2, 3, 4, 8, 17) for layer in (nn.Linear(5, n), nn.Linear(n, 5))))
    structure = sc.trace(model.eval(), torch.randn(3, 5))
    sizes = {axis.name: axis.size for axis in structure.prunable if axis.size != 5}
    kept = half_of_each(structure, list(sizes), 0)
    assert {sizes[name]: int(mask.sum()) for name, mask in kept.items()} == {2: 2, 3: 2, 4: 3, 8: 5, 17: 9}
    stepped = dataclasses.replace(structure, steps=dict.fromkeys(sizes, 4), least=dict.fromkeys(sizes, 9))
    widest = next(name for name, size in sizes.items() if size == 17)
    assert int(half_of_each(stepped, [widest], 0)[widest].sum()) == 12  # three steps of four: nine must stay
