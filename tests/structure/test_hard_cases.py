"""Models that analyses stumble over: shared modules, odd outputs, unused parts, layouts, dtypes."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.core.slots import Criterion
from secateur.errors import InvalidInputs, NothingPrunable
from secateur.structure import rules
from secateur.structure.inputs import output_tensors, relative_error, state_of, undisturbed
from secateur.structure.prove import prove_cut, proved_keep, proved_structure
from secateur.structure.provenance import Attribute, Listener, TracedInt
from secateur.structure.surgery import cut_copy
from secateur.testing.oracle import oracle_error


class Model(nn.Module):
    """A module whose forward is a plain function of (self, x)."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def free(structure):
    return {axis.name: axis.size for axis in structure.prunable}


def half(model, x, **options):
    return sc.prune(model.eval(), x, granularity="channel", budget=sc.Budget(macs=0.5), **options)


def test_a_module_that_is_registered_twice_keeps_its_weights():
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(6, 8), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 3)).eval()
    x, before = torch.randn(4, 6), shared.weight.detach().clone()
    expected = model(x)
    assert sc.trace(model, x).verify(model).ok
    assert isinstance(model[1].weight, nn.Parameter) and model[3].weight is model[1].weight
    assert torch.equal(shared.weight, before) and torch.equal(model(x), expected)
    pruned = half(model, x)
    assert pruned.model[1] is pruned.model[3] and pruned.after.macs < pruned.before.macs
    assert oracle_error(model, pruned.model, pruned.structure_plan, x) < 1e-5  # on the real weights


@dataclass
class Out:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Box:
    def __init__(self, logits):
        self.inside = {"logits": logits}


@pytest.mark.parametrize("wrap", [Out, Box])
def test_outputs_inside_objects_are_found_and_frozen(wrap):
    model = Model(lambda self, x: wrap(self.b(self.a(x).relu())), a=nn.Linear(6, 16), b=nn.Linear(16, 10))
    structure = sc.trace(model, torch.randn(2, 6))
    assert structure.axis("b").reason == "output" and free(structure) == {"a": 16}


def test_a_model_without_an_output_tensor_is_refused():
    model = Model(lambda self, x: self.a(x).sum().item(), a=nn.Linear(6, 4))
    with pytest.raises(InvalidInputs, match="holds no tensor that secateur can find"):
        sc.trace(model, torch.randn(2, 6))


def test_caches_beside_the_real_outputs_are_not_outputs():
    inside = torch.ones(2)
    assert output_tensors((inside, Box(torch.zeros(3)))) == [inside]


def test_integer_and_complex_outputs_are_compared():
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([3 + 4j]), torch.tensor([3 + 4.5j])) == pytest.approx(0.5 / abs(3 + 4.5j))
    assert relative_error((), ()) == float("inf")
    assert relative_error(torch.ones(2), (torch.ones(2), torch.ones(2))) == float("inf")


def test_masked_logits_do_not_hide_errors():
    expected = torch.tensor([1.0, -2.0, -1e9, float("-inf")])
    assert relative_error(torch.tensor([1.0, -1.0, -1e9, float("-inf")]), expected) == pytest.approx(0.5)
    assert relative_error(torch.tensor([1.0, -2.0, -1e9, 0.0]), expected) == float("inf")
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_parameters_that_the_traced_call_does_not_use_are_frozen():
    def forward(self, x, second=None):
        h = self.a(x).relu()
        return self.b(h) if second is None else self.b(h) + self.d(self.c(second).relu())

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3), c=nn.Linear(7, 30), d=nn.Linear(30, 3))
    x, second = torch.randn(2, 6), torch.randn(2, 7)
    structure = sc.trace(model, x)
    assert structure.axis("c").reason == "not used in the traced call" and free(structure) == {"a": 16}
    assert half(model, x).model(x, second).shape == (2, 3)


class RMSNorm(nn.Module):
    """As language models write it: the statistics in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.to(torch.float32)
        return self.weight * (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def test_bfloat16_models_with_float32_statistics():
    model = nn.Sequential(nn.Linear(6, 16), RMSNorm(16), nn.ReLU(), nn.Linear(16, 3)).to(torch.bfloat16)
    pruned = half(model, torch.randn(2, 6, dtype=torch.bfloat16))
    assert pruned.model[0].weight.shape == (8, 6) and pruned.model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_memory_layout_does_not_matter(layout):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 3))
    model.to(memory_format=layout)
    pruned = half(model, torch.randn(2, 3, 8, 8))
    assert pruned.model[0].out_channels == 8 and pruned.model[3].in_features == 8 * 36


def test_fused_attention_layers_are_opened():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 64, batch_first=True).eval()
    model, x = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), torch.randn(2, 5, 16)
    assert {name: size for name, size in free(proved_structure(model, x)).items() if "linear1" in name} == {
        "0.layers.0.linear1": 64,
        "0.layers.1.linear1": 64,
    }
    assert sc.profile(model, x).macs == sc.trace(model, x).macs({})
    assert torch.backends.mha.get_fastpath_enabled()


def test_iterative_cuts_keep_the_names_of_axes():
    for seed in range(3):
        torch.manual_seed(seed)
        layers = (
            nn.Conv2d(3, 24, 3),
            nn.GroupNorm(6, 24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 3, groups=12),
            nn.ReLU(),
            nn.Conv2d(24, 16, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
        model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
        pruned = sc.prune(
            model, x, granularity="channel", budget=sc.Budget(macs=0.1), schedule={"name": "iterative", "steps": 6}
        )
        once = cut_copy(model, pruned.structure_plan).state_dict()
        assert all(torch.equal(once[name], tensor) for name, tensor in pruned.model.state_dict().items())


def test_axes_may_shrink_to_one_unit_before_the_last_round():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(2, 8)
    for schedule in ("iterative", "cubic"):
        pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.25), schedule=schedule)
        assert pruned.model[0].out_features == 1
        with pytest.raises(sc.errors.BudgetUnreachable, match=r"Budget\(macs=0\.2500\)"):
            sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.2), schedule=schedule)


def test_models_whose_output_is_not_finite_are_named_as_such():
    model = Model(lambda self, x: self.a(self.b(x)).abs().neg().log(), a=nn.Linear(16, 4), b=nn.Linear(6, 16))
    verification = sc.trace(model, torch.randn(2, 6)).verify(model)
    assert not verification.ok and "random, not finite" in verification.reason
    with pytest.raises(NothingPrunable, match="random, not finite"):
        half(model, torch.randn(2, 6))


def test_random_numbers_along_an_axis_freeze_it():
    model = Model(lambda self, x: self.a(F.dropout(self.b(x), 0.5, True)), a=nn.Linear(16, 4), b=nn.Linear(6, 16))
    assert "random values" in sc.trace(model, torch.randn(2, 6)).axis("b").reason


class FirstLayerIsWorst(Criterion):
    """The worst units all lie on the first axis."""

    name = "first layer is worst"

    def score(self, context):
        return {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(context.units.shapes.items())}


def test_a_cut_that_cannot_be_proved_is_undone_and_another_one_made():
    def forward(self, x):
        h = self.a(x)
        return self.c(self.b(h if h.shape[1] >= 6 else 2 * h).relu())

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 3))
    pruned = half(model, torch.randn(2, 6), criterion=FirstLayerIsWorst())
    assert pruned.model.a.out_features >= 6  # half of the MACs is met before the size matters
    options = {"granularity": "channel", "criterion": FirstLayerIsWorst(), "budget": sc.Budget(macs=0.35)}
    pruned = sc.prune(model, torch.randn(2, 6), **options)
    assert pruned.model.a.out_features == 16 and pruned.model.b.out_features < 16
    assert "could not be proved" in pruned.structure.axis("a").reason and pruned.after.macs <= 0.35 * pruned.before.macs


def test_a_single_unit_that_takes_another_path_does_not_freeze_its_axis():
    def forward(self, x):
        parts = self.a(x).view(len(x), self.radix, -1)
        weights = parts.softmax(1) if self.radix > 1 else parts.sigmoid()
        return self.b((parts * weights).sum(1))

    model = Model(forward, a=nn.Linear(6, 32), b=nn.Linear(8, 3))
    model.radix = 4
    x = torch.randn(2, 6)
    structure = proved_structure(model, x)
    assert structure.verify(model).ok and free(structure) == {"a[radix]": 4, "a": 8}
    kept = {"a[radix]": torch.arange(4) < 2}
    assert prove_cut(model, structure, kept).ok
    kept["a[radix]"] = torch.arange(4) < 1
    proof, left = proved_keep(model, structure, kept)
    assert not proof.ok and "could not be proved" in left.axis("a[radix]").reason


class Heard(Listener):
    """Remembers what it has heard."""

    def __init__(self):
        self.values, self.equal = [], []

    def read_value(self, expression):
        self.values.append(expression)

    def find_equal(self, a, b):
        self.equal.append((a, b))


def test_traced_integers_compare_like_integers_and_say_so():
    heard, place, other = Heard(), Attribute("a", "width"), Attribute("b", "dim")
    traced = TracedInt(16, place, heard)
    assert traced == 16 and traced == 16.0 and traced != 16.5 and not traced != 16 and traced != "16"
    assert torch.equal(traced == torch.tensor([16, 3]), torch.tensor([True, False]))
    assert {16: "found"}[traced] == "found"
    assert heard.equal == []  # a literal has no place
    assert traced == TracedInt(16, other, heard) and traced != TracedInt(8, other, heard)
    assert not traced != TracedInt(16, place, heard)
    assert heard.equal == [(place, other), (place, place)]
    assert traced**-0.5 == 0.25 and heard.values == [place]
    assert Listener().read_value(place) is None and Listener().find_equal(place, other) is None


@pytest.mark.parametrize("insists", [False, True])
def test_code_that_insists_on_a_size_gets_it(insists):
    def forward(self, x):
        h = self.a(x)
        if (h.shape[1] != self.channels) if insists else (self.channels == h.shape[1] + 1):
            raise ValueError("make sure that the channels are those of the configuration")
        return self.b(h)

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    model.channels = 16
    pruned = half(model, torch.randn(2, 6)).model
    assert pruned.a.out_features == 8 and pruned.channels == (8 if insists else 16)


def test_a_rule_that_stumbles_freezes_instead_of_failing():
    model = Model(
        lambda self, x: self.b(self.a(x) + torch.full(size=(16,), fill_value=2.0)),
        a=nn.Linear(6, 16),
        b=nn.Linear(16, 3),
    )
    assert sc.trace(model, torch.randn(2, 6)).verify(model).ok
    scalar = Model(lambda self, x: self.b(self.a(x)) * self.s.transpose(0, 0), a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    scalar.s = nn.Parameter(torch.tensor(2.0))
    assert free(sc.trace(scalar, torch.randn(2, 6))) == {"a": 16}


def test_many_slices_of_one_dim():
    def forward(self, x):
        h = self.a(x)
        return self.b(sum(h[:, i : i + 1] for i in range(1200)))

    model = Model(forward, a=nn.Linear(6, 1200), b=nn.Linear(1, 3))
    assert sc.trace(model, torch.randn(2, 6)).verify(model).ok


def test_a_buffer_that_is_a_parameter_is_one_tensor():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model.register_buffer("alias", model[0].weight)
    assert list(state_of(model)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    pruned = half(model, torch.randn(2, 6)).model
    assert pruned.alias is pruned[0].weight and pruned.alias.shape == (8, 6)


def test_an_attribute_larger_than_the_dim_it_slices():
    model = Model(lambda self, x: self.b(self.a(x)[:, 1 : self.most]), a=nn.Linear(6, 17), b=nn.Linear(16, 3))
    model.most = 5000
    assert sc.trace(model, torch.randn(2, 6)).verify(model).ok
    model.most = 17
    assert sc.trace(model, torch.randn(2, 6)).verify(model).ok


def test_nothing_that_a_forward_stores_stays_in_the_model():
    def forward(self, x):
        self.last, self.steps = x.shape[-1], self.steps + 1
        return self.b(self.a(x))

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    model.register_buffer("steps", torch.zeros(()))
    before = dict(vars(model.eval()))
    sc.trace(model, torch.randn(2, 6))
    sc.profile(model, torch.randn(2, 6))
    half(model, torch.randn(2, 6))
    assert vars(model) == before and model.steps == 0 and not hasattr(model, "last")
    with undisturbed(model):
        model(torch.randn(2, 6))
        assert model.last == 6
    assert not hasattr(model, "last")


@pytest.mark.parametrize("slots", [{"weights_from": "init"}, {"mask_from": "init", "schedule": "iterative"}])
def test_checkpoints_of_models_with_tied_weights(slots):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[4].weight = model[2].weight
    init = {name: tensor + 1 for name, tensor in copy.deepcopy(model.state_dict()).items()}
    pruned = half(model, torch.randn(2, 6), checkpoints={"init": init}, **slots)
    assert pruned.model[4].weight is pruned.model[2].weight and pruned.after.macs < pruned.before.macs


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (nn.ConvTranspose2d(16, 16, 2, 2, groups=16), 16),
        (nn.PReLU(16), 16),
        (nn.PixelShuffle(2), 4),
        (nn.ChannelShuffle(4), 16),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 12, 3)), 12),
        (nn.Unfold(2), 16 * 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_that_rules_know(layer, width):
    tail = [nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 3)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), layer, *tail)
    structure = proved_structure(model, torch.randn(2, 3, 8, 8))
    assert structure.axis("0").prunable or any(a.name.startswith("0") for a in structure.prunable), structure.axes


def test_spatial_dims_that_a_kernel_mixes_are_frozen():
    model = Model(
        lambda self, x: self.o(self.c(self.a(x)[:, None]).flatten(1)),
        a=nn.Linear(6, 16),
        c=nn.Conv1d(1, 4, 3, padding=1),
        o=nn.Linear(64, 3),
    )
    structure = sc.trace(model, torch.randn(2, 6))
    assert structure.verify(model).ok and free(structure) == {"c": 4}


class Attention(nn.Module):
    """As image models write it: the result is reshaped to the shape of the input, so width = heads x head_dim."""

    def __init__(self, width, heads, computed=()):
        super().__init__()
        self.heads, self.head_dim, self.computed = heads, width // heads, computed
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        B, N, C = x.shape
        head_dim = C // self.heads if "head_dim" in self.computed else self.head_dim
        scale = (C // self.heads) ** -0.5 if "scale" in self.computed else self.scale
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize("computed", [(), ("head_dim",), ("scale",), ("head_dim", "scale")])
def test_a_width_that_is_heads_times_head_dim_loses_whole_heads(computed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 48), Attention(48, 6, computed), nn.Linear(48, 3)).eval()
    x = torch.randn(2, 5, 6)
    structure = proved_structure(model, x)
    (tie,) = structure.ties
    assert structure.steps == {"0": 8} and structure.axis("0").size == 48 and len(tie) == 2
    pruned = half(model, x)
    heads = pruned.model[1].heads
    assert 1 <= heads < 6 and pruned.model[0].out_features == 8 * heads and pruned.model[1].scale == model[1].scale
    assert pruned.after.macs <= 0.5 * pruned.before.macs and pruned.model(x).shape == (2, 5, 3)
    assert oracle_error(model, pruned.model, pruned.structure_plan, x) < 1e-5


def test_grouped_queries_are_cut_with_their_key():
    def forward(self, x):
        B, L, _ = x.shape
        q = self.q(x).view(B, L, -1, self.head_dim).transpose(1, 2)
        k, v = (layer(x).view(B, L, -1, self.head_dim).transpose(1, 2) for layer in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(B, L, -1))

    layers = {"q": nn.Linear(6, 64), "k": nn.Linear(6, 16), "v": nn.Linear(6, 16), "o": nn.Linear(64, 3)}
    model = Model(forward, **layers)
    model.head_dim = 4
    structure = proved_structure(model.eval(), torch.randn(2, 5, 6))
    kv = next(a for a in structure.prunable if {name for name, _ in a.members} >= {"q.weight", "k.weight", "v.weight"})
    assert kv.size == 4 or kv.size == model.head_dim
    assert any("query heads of one key" in axis.reason for axis in structure.axes)
    pruned = half(model, torch.randn(2, 5, 6)).model
    assert pruned.q.out_features % pruned.k.out_features == 0


def test_models_that_install_hooks_or_fill_caches_at_the_first_call():
    def forward(self, x):
        if not self.installed:
            self.installed = True
            self.a.register_forward_hook(lambda module, args, output: self.log.append(output) or output)
        if "table" not in self.cache:
            self.cache["table"] = self.table * 2
        return self.b(self.a(x) + self.cache["table"])

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    model.installed, model.cache, model.log, model.table = False, {}, [], nn.Parameter(torch.ones(16))
    structure = sc.trace(model, torch.randn(2, 6))
    assert not (model.installed or model.cache or model.log or model.a._forward_hooks)
    assert structure.verify(model).ok and free(structure) == {"table": 16}


def test_channels_last_pooling_keeps_its_dims():
    layers = nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert free(proved_structure(model.eval(), x)) == {"0": 16}


@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_pooling_along_the_sequence_keeps_the_width(pool):  # as in Funnel
    model = Model(
        lambda self, x: self.b(pool(self.a(x)[:, None], (2, 1))[:, 0]), a=nn.Linear(6, 16), b=nn.Linear(16, 3)
    )
    x = torch.randn(2, 8, 6)
    assert free(proved_structure(model.eval(), x)) == {"a": 16}
    across = Model(
        lambda self, x: self.b(pool(self.a(x)[:, None], (1, 2))[:, 0]), a=nn.Linear(6, 16), b=nn.Linear(8, 3)
    )
    assert not free(sc.trace(across.eval(), x))


def test_a_factory_may_get_a_size_as_a_tensor():  # as in Longformer
    def forward(self, x):
        y = self.a(x)
        blank = y.new_zeros(torch.tensor(4), self.a.out_features)
        return self.b(torch.cat([blank, y]))

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    assert free(proved_structure(model.eval(), torch.randn(2, 6))) == {"a": 16}


def test_experts_lose_hidden_units_and_scattered_rows_keep_their_width():
    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).topk(1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen[:, 0] == i).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(x[rows]) * weight[rows])
        return self.head(y)

    def expert():
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

    torch.manual_seed(0)
    model = Model(forward, router=nn.Linear(8, 2), experts=nn.ModuleList([expert(), expert()]), head=nn.Linear(8, 3))
    structure = sc.trace(model.eval(), torch.randn(16, 8))
    assert structure.verify(model).ok
    assert free(structure) == {"experts.0.0": 12, "experts.1.0": 12}
    assert "rows are assigned to units by value, and eq uses which" in structure.axis("router").reason


class WithAuxiliaryHead(nn.Module):
    """As GoogLeNet: a second head that works in training only; and a mask token, as in wav2vec 2.0."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.auxiliary = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)
        self.token = nn.Parameter(torch.randn(16))

    def forward(self, x):
        h = self.a(x)
        if not self.training:
            return self.b(h.relu())
        hidden = torch.rand(len(x)) < np.random.rand()
        h = F.dropout(torch.where(hidden[:, None], self.token, h), 0.1, self.training)
        return self.b(h.relu()) + self.auxiliary(h)


def test_parts_that_work_in_training_only_follow_the_cut():
    model, x = WithAuxiliaryHead().eval(), torch.randn(4, 6)
    state = np.random.get_state()[1].copy()
    structure = sc.trace(model, x)
    assert (np.random.get_state()[1] == state).all()
    assert structure.macs({}) == 4 * (6 * 16 + 16 * 3)
    (axis,) = structure.prunable
    assert {name for name, _ in axis.members} == {"a.weight", "a.bias", "b.weight", "auxiliary.weight", "token"}
    pruned = half(model, x).model
    assert pruned.train()(x).shape == (4, 3) and pruned.auxiliary.in_features == 8 == len(pruned.token)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "two, both ways"])
def test_recurrent_layers_lose_hidden_units(layer, options):
    torch.manual_seed(0)
    width = 32 if options else 16
    recurrent = layer(8, 16, batch_first=True, **options)
    model = Model(lambda self, x: self.o(self.r(self.i(x))[0]), i=nn.Linear(6, 8), r=recurrent, o=nn.Linear(width, 3))
    x = torch.randn(3, 5, 6)
    assert sc.trace(model.eval(), x).macs({}) == sc.profile(model, x).macs
    pruned = half(model, x)
    small = pruned.model.r
    assert sorted(axis.size for axis in pruned.structure.prunable) == [8, 16] and small.hidden_size < 16
    assert small.weight_hh_l0.shape[1] == small.hidden_size and small.weight_ih_l0.shape[1] == small.input_size
    pruned.model.train()(x).sum().backward()
    assert all(p.grad is not None for p in pruned.model.parameters())


class StandardizedConv2d(nn.Conv2d):
    """As in NFNets: kernels are standardized over their inputs at every call."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def test_standardized_weights():
    torch.manual_seed(0)
    first, second = StandardizedConv2d(3, 16, 3), StandardizedConv2d(16, 12, 3)
    model = nn.Sequential(first, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(2, 3, 8, 8)
    assert free(proved_structure(model.eval(), x)) == {"0": 16, "2": 12}
    pruned = half(model, x)
    assert pruned.model[0].out_channels < 16 and pruned.proofs[-1].max_error < 1e-5


def test_the_factor_that_can_vary_varies():
    """The head dim is a number for the attention; the heads, although minor here, can be cut."""

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.o(F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).reshape(B, N, C))

    layers = {"qkv": nn.Linear(48, 144), "o": nn.Linear(48, 3)}
    attention = Model(forward, **layers)
    attention.heads, attention.head_dim = 6, 8
    model, x = nn.Sequential(nn.Linear(6, 48), attention).eval(), torch.randn(2, 5, 6)
    structure = proved_structure(model, x)
    assert structure.steps == {"0": 8} and half(model, x).model[1].heads < 6


def divided_by_heads(self, x):
    b, n, c = x.shape
    q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
    mixed = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.view(-1, 1, 1)
    return self.out(x + self.proj((mixed.softmax(-1) @ v).transpose(1, 2).reshape(b, n, -1)))


def split_by_a_difference(self, x):
    first, second = torch.split(self.enter(x), [self.part, self.whole - self.part], dim=-1)
    return self.out(torch.cat([self.inner(first), second], dim=-1))


def split_in_two(self, x):
    first, second = torch.split(self.enter(x), self.whole // self.paths, dim=-1)
    return self.out(torch.cat([self.inner(first), second], dim=-1))


def test_a_width_that_is_divided_by_the_number_of_heads_follows_them():
    model = Model(divided_by_heads, stem=nn.Linear(5, 12), qkv=nn.Linear(12, 36), proj=nn.Linear(12, 12))
    model.heads, model.scale, model.out = 4, nn.Parameter(torch.ones(4)), nn.Linear(12, 3)
    whole = nn.Sequential(nn.Linear(5, 12), model).eval()
    structure = proved_structure(whole, torch.randn(2, 6, 5))
    stream = next(axis for axis in structure.prunable if ("0.weight", 0) in axis.members)
    heads = next(axis for axis in structure.prunable if ("1.scale", 0) in axis.members)
    assert {stream.name, heads.name} <= set(next(tie for tie in structure.ties if heads.name in tie))
    assert (stream.size, structure.steps[stream.name], heads.size) == (12, 3, 4)
    pruned = half(whole, torch.randn(2, 6, 5))
    assert pruned.model[1].heads < 4 and pruned.model[0].out_features == 3 * pruned.model[1].heads


@pytest.mark.parametrize(
    ("number", "tied", "reason"),
    [
        (lambda self, c: c // self.heads, True, ""),  # 12 = 4 x 3: the width loses 3 with each head
        (lambda self, c: c // 4, False, "its size is used as a number"),
        (lambda self, c: c - self.heads, False, "must stay as long as another dim"),
        (lambda self, c: c % 2, False, "its size is used as a number"),
        (lambda self, c: c // 100, False, ""),  # 0 whatever the width
        (lambda self, c: self.other // 4, False, ""),  # no size
    ],
)
def test_a_number_that_is_computed_from_sizes_stays_what_it_is(number, tied, reason):
    def forward(self, x):
        x = self.enter(x)
        heads = self.inner(x).view(-1, self.heads, 5) * 2 ** number(self, x.shape[-1])
        return self.out(heads.sum(-1)) + self.side(x)

    parts = {"enter": nn.Linear(5, 12), "inner": nn.Linear(12, 20), "out": nn.Linear(4, 3), "side": nn.Linear(12, 3)}
    model, x = Model(forward, **parts).eval(), torch.randn(2, 5)
    model.heads, model.other = 4, 8
    structure = proved_structure(model, x)
    enter = structure.axis("enter")
    heads = next(axis for axis in structure.axes if ("out.weight", 1) in axis.members)
    assert enter.prunable == (not reason) and reason in enter.reason
    assert [set(tie) for tie in structure.ties] == ([{enter.name, heads.name}] if tied else [])
    assert structure.steps == ({enter.name: 3} if tied else {})
    if not reason:
        pruned = half(model, x)
        assert oracle_error(model, pruned.model, pruned.structure_plan, x) < 1e-5
        assert number(pruned.model, pruned.model.enter.out_features) == number(model, 12)


@pytest.mark.parametrize(("forward", "part"), [(split_by_a_difference, 8), (split_in_two, 6)])
def test_a_width_that_is_computed_from_others_is_rewritten(forward, part):
    model = Model(forward, enter=nn.Linear(5, 12), inner=nn.Linear(part, 7), out=nn.Linear(7 + 12 - part, 3))
    model.part, model.whole, model.paths = part, 12, 2
    pruned = half(model, torch.randn(4, 5))
    small = pruned.model
    assert small.whole == small.enter.out_features < 12
    assert oracle_error(model, small, pruned.structure_plan, torch.randn(4, 5)) < 1e-5


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_that_know_their_normalized_shape(norm, dtype):
    model = nn.Sequential(nn.Linear(6, 16), norm(16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    small = half(model, torch.randn(2, 6, dtype=dtype)).model
    assert small[1].normalized_shape == (8,) and small[1].weight.shape == (8,)
    literal = Model(lambda self, x: self.b(F.rms_norm(self.a(x), (16,))), a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    assert "the code says 16" in sc.trace(literal, torch.randn(2, 6)).axis("a").reason


def test_float64_models_are_proved_in_float64():
    """PyTorch has an operation of its own for an LSTM in float32 alone."""
    model = Model(
        lambda self, x: self.o(self.r(self.i(x))[0]),
        i=nn.Linear(6, 4),
        r=nn.LSTM(4, 5, batch_first=True),
        o=nn.Linear(5, 3),
    ).to(torch.float64)
    assert len(free(proved_structure(model, torch.randn(2, 6, 6, dtype=torch.float64)))) == 2


def test_rows_that_a_mask_selects_keep_their_width():
    def forward(self, x):
        return self.b(self.a(x) + self.w[self.mask].sum(0))

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    model.w, model.mask = nn.Parameter(torch.randn(3, 16)), torch.tensor([True, False, True])
    structure = proved_structure(model.eval(), torch.randn(2, 6))
    assert free(structure) == {"a": 16} and ("w", 1) in structure.axis("a").members
    chosen = Model(lambda self, x: self.b(self.a(x)[:, self.m]), a=nn.Linear(6, 16), b=nn.Linear(8, 3))
    chosen.m = torch.arange(16) % 2 == 0
    structure = sc.trace(chosen, torch.randn(2, 6))
    assert not structure.prunable and "looked up by index" in structure.axis("a").reason


@pytest.mark.parametrize("expand", [torch.Tensor.expand, torch.broadcast_to])
def test_a_width_that_an_expansion_states_follows_or_is_frozen(expand):
    def forward(self, x):
        return self.b(self.a(x) * expand(self.w, (len(x), self.width)))

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    model.w, model.width = nn.Parameter(torch.randn(16)), 16
    assert free(sc.trace(model, torch.randn(2, 6))) == {"w": 16}
    assert half(model, torch.randn(2, 6)).model.width == 8
    literal = Model(lambda self, x: self.b(self.a(x) * expand(self.w, (2, 16))), a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    literal.w = nn.Parameter(torch.randn(16))
    assert "the code says 16" in sc.trace(literal, torch.randn(2, 6)).axis("w").reason


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_projected_recurrent_layers_lose_hidden_units_and_projections(bidirectional):
    torch.manual_seed(0)
    recurrent = nn.LSTM(8, 16, 2, batch_first=True, proj_size=6, bidirectional=bidirectional)
    head = nn.Linear(12 if bidirectional else 6, 3)
    model = Model(lambda self, x: self.o(self.r(self.i(x))[0]), i=nn.Linear(5, 8), r=recurrent, o=head).eval()
    x = torch.randn(2, 4, 5)
    pruned = half(model, x)
    small = pruned.model.r
    assert small.hidden_size < 16 and small.proj_size < 6
    assert small.weight_hr_l0.shape == (small.proj_size, small.hidden_size)
    assert oracle_error(model, pruned.model, pruned.structure_plan, x) < 1e-10


def test_a_rule_whose_dims_do_not_fit_the_result_freezes(monkeypatch):
    def wrong(call):
        call.tracer.set(call.out, call.tracer.dims(call["self"])[::-1])

    monkeypatch.setitem(rules.all_rules(), "relu", wrong)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    assert "does not know this form of it (StructureError" in sc.trace(model, torch.randn(2, 6)).axis("0").reason


def test_the_median_of_all_values_freezes_all_dims():
    model = Model(
        lambda self, x: self.b(self.a(x.mT).mT) * self.a(x.mT).median(), a=nn.Linear(5, 16), b=nn.Linear(6, 3)
    )
    assert not free(sc.trace(model, torch.randn(2, 5, 6)))


def test_rows_that_are_written_by_index_are_frozen_and_their_width_is_not():
    def forward(self, x):
        h = self.a(x).clone()
        h[:, self.rows] = self.w
        return self.b(h)

    model = Model(forward, a=nn.Linear(6, 16), b=nn.Linear(16, 3))
    model.w, model.rows = nn.Parameter(torch.randn(2, 16)), torch.tensor([0, 3])
    structure = proved_structure(model.eval(), torch.randn(2, 5, 6))
    (axis,) = structure.prunable
    assert ("w", 1) in axis.members and "constant tensor" in structure.axis("w").reason  # the index


def test_group_norm_over_units_in_space():
    """Rows and columns are units of a layer; the statistics run over them, too."""
    layers = nn.Linear(6, 12), nn.Unflatten(2, (3, 4)), nn.GroupNorm(2, 4), nn.Flatten(2), nn.Linear(12, 3)
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 4, 6, dtype=torch.float64)
    assert sorted(free(proved_structure(model, x)).values()) == [3, 4]


class ComplexRotary(nn.Module):
    """Turns the last units of a projection as complex numbers: a view that begins where the plain units end."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.rotary = plain, 4
        self.a, self.b = nn.Linear(5, plain + 4), nn.Linear(plain + 4, 3)
        self.register_buffer("turn", torch.polar(torch.ones(2), torch.tensor([0.3, 1.2])))

    def forward(self, x):
        plain, rotary = self.a(x).split([self.plain, self.rotary], -1)
        numbers = torch.view_as_complex(rotary.reshape(*rotary.shape[:-1], -1, 2)) * self.turn
        return self.b(torch.cat([plain, torch.view_as_real(numbers).flatten(-2)], -1))


def test_units_beside_complex_rotary_embeddings_are_cut_in_pairs():
    model, x = ComplexRotary(plain=6).eval(), torch.randn(2, 4, 5)
    structure = sc.trace(model, x)
    assert structure.verify(model).ok
    assert {axis.name: axis.size for axis in structure.prunable} == {"a[plain]": 6}
    assert structure.steps == {"a[plain]": 2}  # an odd number would move the pairs to odd places, which no view takes
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.9))
    assert pruned.model.plain == 4 and pruned.model.rotary == 4 and pruned.model.a.out_features == 8
