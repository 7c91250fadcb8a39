"""What the trace finds in small networks: axes, ties, frozen dims with reasons, attributes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.errors import InvalidInputs
from secateur.structure.prove import prove_cut, proved_structure
from secateur.structure.surgery import cut_copy, make_plan
from secateur.testing.toys import NETWORKS, toy


def free(structure: sc.Structure) -> dict[str, int]:
    return {axis.name: axis.size for axis in structure.prunable}


def reason(structure: sc.Structure, name: str) -> str:
    return structure.axis(name).reason


def half(structure: sc.Structure) -> dict[str, torch.Tensor]:
    return {a.name: torch.arange(a.size) % 2 == 0 for a in structure.prunable}


def model_of(forward, **modules) -> nn.Module:
    """A module whose forward is a plain function of (self, x)."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, *args, **kwargs):
            return forward(self, *args, **kwargs)

    return Model().eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_toy_is_verified_and_every_cut_is_proved(name):
    model, x = toy(name)
    structure = sc.trace(model, x)
    verification = structure.verify(model)
    assert verification.ok and verification.max_error < 1e-5
    proof = prove_cut(model, structure, half(structure))
    assert proof.ok and proof.max_error < 1e-5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", {"1": 32, "3": 24}),
        ("squeeze_excite", {"0": 48, "2.reduce": 8, "3": 64, "5.reduce": 8}),
        ("grouped", {"0[num_groups]": 4, "0": 3, "0#2": 2, "3": 3, "6": 16}),
    ],
)
def test_axes_of_toys(name, expected):
    model, x = toy(name)
    assert free(sc.trace(model, x)) == expected


def test_residual_stream_is_one_axis_through_all_its_members():
    model, x = toy("resnet20")
    structure = sc.trace(model, x)
    members = {name for name, _ in structure.axis("conv1").members}
    assert {"conv1.weight", "blocks.0.conv2.weight", "blocks.2.bn2.weight", "blocks.3.conv1.weight"} <= members
    assert {"blocks.0.bn2.running_mean", "blocks.3.shortcut.0.weight"} <= members


def test_concatenation_gives_segments_with_their_own_axes():
    model, x = toy("densenet")
    structure = sc.trace(model, x)
    assert {"0": 16, "1.conv": 8, "2.conv": 8}.items() <= free(structure).items()
    assert ("4.weight", 0) in structure.axis("1.conv").members  # BatchNorm over the concatenated channels


def test_depthwise_convolution_shares_its_input_axis_and_its_groups_follow():
    model, x = toy("mobilenet")
    structure = sc.trace(model, x)
    axis = structure.axis("3.expand.0")
    assert ("3.depthwise.0.weight", 0) in axis.members
    attribute = next(a for a in structure.attributes if str(a) == "3.depthwise.0.groups")
    assert structure.attributes[attribute].find() is axis.leaf


def test_attention_has_heads_head_dim_and_the_attributes_that_hold_their_sizes():
    model, x = toy("vit")
    structure = sc.trace(model, x)
    found = free(structure)
    assert found["blocks.0.attention.qkv[heads]"] == 3 and found["blocks.0.attention.qkv[head_dim]"] == 8
    assert found["patches"] == 24 and found["blocks.1.mlp.0"] == 96
    assert {"blocks.0.attention.heads", "blocks.0.attention.head_dim"} <= {str(a) for a in structure.attributes}


def test_kernels_inputs_and_outputs_are_frozen_with_a_reason():
    model, x = toy("resnet20")
    structure = sc.trace(model, x)
    assert reason(structure, "fc") == "output"
    assert reason(structure, "conv1:1") == "input"
    assert reason(structure, "conv1:2").startswith("convolution kernel")


def test_a_literal_in_a_reshape_freezes_and_an_attribute_does_not():
    literal = model_of(
        lambda self, x: self.b(self.a(x).reshape(x.shape[0], 4, 6).flatten(1)), a=nn.Linear(5, 24), b=nn.Linear(24, 2)
    )
    structure = sc.trace(literal, torch.randn(2, 5))
    assert not structure.prunable
    assert any("the code says 4" in axis.reason for axis in structure.axes)

    attribute = model_of(
        lambda self, x: self.b(self.a(x).reshape(x.shape[0], self.rows, self.columns).flatten(1)),
        a=nn.Linear(5, 24),
        b=nn.Linear(24, 2),
    )
    attribute.rows, attribute.columns = 4, 6
    structure = proved_structure(attribute, torch.randn(2, 5))
    assert sorted(free(structure).values()) == [4, 6]


def test_a_size_read_from_another_dim_ties_the_counts():
    model = model_of(
        lambda self, x: self.c(self.b(self.a(x).relu()).view(x.shape[0], self.a(x).shape[1])),
        a=nn.Linear(5, 8),
        b=nn.Linear(8, 8),
        c=nn.Linear(8, 2),
    )
    structure = proved_structure(model, torch.randn(2, 5))
    assert structure.ties == (("a", "b"),)


def test_a_size_used_as_a_number_freezes_its_axis():
    model = model_of(
        lambda self, x: self.b(self.a(x) * self.a(x).shape[-1] ** -0.5), a=nn.Linear(5, 8), b=nn.Linear(8, 2)
    )
    structure = sc.trace(model, torch.randn(2, 5))
    assert "used as a number" in reason(structure, "a")

    by_attribute = model_of(
        lambda self, x: self.b(self.a(x).view(-1, self.width) / self.width), a=nn.Linear(5, 8), b=nn.Linear(8, 2)
    )
    by_attribute.width = 8
    assert "used as a number" in reason(sc.trace(by_attribute, torch.randn(2, 5)), "a")


def test_computed_head_dim_is_followed_where_it_can_be():
    """head_dim = width // heads follows a cut of head_dim only if the width follows too; else both freeze."""

    def forward(self, x):
        y = self.a(x)
        y = y.view(x.shape[0], self.heads, y.shape[-1] // self.heads)
        return self.b(y.flatten(1))

    model = model_of(forward, a=nn.Linear(5, 24), b=nn.Linear(24, 2))
    model.heads = 4
    structure = proved_structure(model, torch.randn(2, 5))
    assert structure.verify(model).ok
    assert sorted(free(structure).values()) == [4, 6]
    assert prove_cut(model, structure, half(structure)).ok


def test_chunks_must_stay_equal():
    model = model_of(lambda self, x: self.b(torch.mul(*self.a(x).chunk(2, 1))), a=nn.Linear(5, 12), b=nn.Linear(6, 2))
    structure = proved_structure(model, torch.randn(2, 5))
    assert free(structure) == {"a": 6}  # both halves are one axis: they are multiplied

    added = model_of(
        lambda self, x: self.b(self.a(x).chunk(2, 1)[0]) + self.c(self.a(x).chunk(2, 1)[1]),
        a=nn.Linear(5, 12),
        b=nn.Linear(6, 2),
        c=nn.Linear(6, 2),
    )
    structure = proved_structure(added, torch.randn(2, 5))
    assert sorted(free(structure).values()) == [6, 6] and len(structure.ties) == 1


def test_split_sizes_from_attributes_follow_and_literals_freeze():
    def forward(self, x):
        left, right = self.a(x).split([self.left, self.right], 1)
        return self.b(left) + self.c(right)

    model = model_of(forward, a=nn.Linear(5, 12), b=nn.Linear(4, 2), c=nn.Linear(8, 2))
    model.left, model.right = 4, 8
    structure = proved_structure(model, torch.randn(2, 5))
    assert sorted(free(structure).values()) == [4, 8]
    kept = half(structure)
    cut = cut_copy(model, make_plan(structure, kept))
    assert (cut.left, cut.right) == (2, 4)

    literal = model_of(
        lambda self, x: self.b(self.a(x)[:, :4]) + self.c(self.a(x)[:, 4:]),
        a=nn.Linear(5, 12),
        b=nn.Linear(4, 2),
        c=nn.Linear(8, 2),
    )
    structure = proved_structure(literal, torch.randn(2, 5))
    assert free(structure) == {"a#2": 8}  # the open-ended slice can shrink, the first four cannot


def test_padding_shortcut_keeps_the_padded_channels():
    model = model_of(
        lambda self, x: self.c(F.pad(self.a(x), (0, 0, 0, 0, 2, 2)) + self.b(x)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 8, 1),
        c=nn.Conv2d(8, 2, 1),
    )
    structure = proved_structure(model, torch.randn(2, 3, 4, 4))
    assert free(structure) == {"a": 4}
    assert ("b.weight", 0) in structure.axis("a").members


def test_an_unknown_operation_freezes_what_it_touches_and_says_so():
    model = model_of(lambda self, x: self.b(torch.fft.rfft(self.a(x)).real), a=nn.Linear(5, 8), b=nn.Linear(5, 2))
    structure = sc.trace(model, torch.randn(2, 5))
    assert "no rule for the operation" in reason(structure, "a")


def test_order_dependent_operations_freeze():
    model = model_of(lambda self, x: self.b(self.a(x).cumsum(1)), a=nn.Linear(5, 8), b=nn.Linear(8, 2))
    assert "cumsum depends on the order" in reason(sc.trace(model, torch.randn(2, 5)), "a")


def test_default_attention_scale_freezes_the_head_dim():
    model = model_of(
        lambda self, x: self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))),
        q=nn.Linear(6, 8),
        k=nn.Linear(6, 8),
        v=nn.Linear(6, 10),
        o=nn.Linear(10, 2),
    )
    structure = proved_structure(model, torch.randn(2, 5, 6))
    assert "used as a number" in reason(structure, "q") and free(structure) == {"v": 10}


def test_tied_weights_are_one_tensor():
    def forward(self, tokens):
        return F.linear(self.mix(self.embedding(tokens)).relu(), self.embedding.weight)

    model = model_of(forward, embedding=nn.Embedding(11, 8), mix=nn.Linear(8, 8))
    structure = proved_structure(model, torch.randint(0, 11, (2, 4)))
    assert reason(structure, "embedding").startswith("looked up by index")
    assert structure.verify(model).ok


def test_keyword_inputs_and_dict_outputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, *, x, scale=None):
            hidden = self.a(x)
            return {"logits": self.b(hidden * scale), "hidden_norm": hidden.norm(dim=1)}

    model = Model().eval()
    structure = sc.trace(model, {"x": torch.randn(2, 4)}, {"scale": torch.tensor(2.0)})
    assert free(structure) == {"a": 6} and structure.verify(model).ok


def test_the_model_is_left_as_it_was():
    model, x = toy("resnet20")
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    structure = sc.trace(model, x)
    structure.verify(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and torch.equal(rng, torch.get_rng_state())
    assert type(model.fc.in_features) is int and type(model.conv1.stride[0]) is int


@pytest.mark.parametrize(("inputs", "message"), [("text", "hold no tensor"), (torch.randn(2, 5, 7), "does not run")])
def test_bad_inputs_give_one_clear_error(inputs, message):
    model, _ = toy("resnet20")
    with pytest.raises(InvalidInputs, match=message):
        sc.trace(model, inputs)
    assert type(model.fc.in_features) is int


def test_predicted_costs_equal_counted_ones_before_and_after_a_cut():
    for name in NETWORKS:
        model, x = toy(name)
        structure = sc.trace(model, x)
        assert structure.macs({}) == sc.profile(model, x).macs
        assert structure.params({}) == sc.profile(model, x).params
        kept = half(structure)
        small = cut_copy(model, make_plan(structure, kept))
        counts = {name: int(mask.sum()) for name, mask in kept.items()}
        assert structure.macs(counts) == sc.profile(small, x).macs
        assert structure.params(counts) == sc.profile(small, x).params
