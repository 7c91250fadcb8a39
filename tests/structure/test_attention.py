"""PyTorch's attention layer: heads, query/key widths and value widths can be cut, whatever its options."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.structure.attention import MultiheadAttention, opened_attention
from secateur.structure.prove import proved_structure
from secateur.structure.surgery import cut_copy, make_plan
from secateur.testing.oracle import oracle_error


class Block(nn.Module):
    """Attention between two linear layers; returns the weights, too."""

    def __init__(self, need_weights=True, cross=False, **options):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.head = nn.Linear(16, 3)
        self.need_weights, self.cross = need_weights, cross

    def forward(self, x, memory=None):
        x = self.embed(x)
        memory = memory if self.cross else x
        out, weights = self.attention(x, memory, memory, need_weights=self.need_weights)
        return self.head(x + out), weights


def kept(structure, **units):
    """Keep the listed units of some axes."""
    masks = {}
    for axis in structure.prunable:
        masks[axis.name] = torch.ones(axis.size, dtype=torch.bool)
    for name, indices in units.items():
        found = next(a.name for a in structure.prunable if a.name == name or a.name.endswith(f"[{name}]"))
        masks[found][:] = False
        masks[found][indices] = True
    return masks


def generic(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.eval()


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False, "kdim": 10, "vdim": 6},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_our_layer_returns_what_pytorchs_does(options):
    torch.manual_seed(0)
    layer = generic(nn.MultiheadAttention(15, 3, **options))
    q, k, v = torch.randn(2, 5, 15), torch.randn(2, 7, layer.kdim), torch.randn(2, 7, layer.vdim)
    if not layer.batch_first:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    banned = torch.zeros(5, 7, dtype=torch.bool)
    banned[:, 4:] = True
    masks = [None, banned, torch.randn(5, 7), torch.randn(6, 5, 7)]
    paddings = [None, torch.zeros(2, 7), banned[:2]]
    for need, average, mask, padding in itertools.product([True, False], [True, False], masks, paddings):
        if mask is not None and padding is not None and mask.dtype != padding.dtype:
            continue  # PyTorch warns
        call = {"need_weights": need, "average_attn_weights": average, "attn_mask": mask, "key_padding_mask": padding}
        expected = layer(q, k, v, **call)
        with opened_attention(layer):
            assert type(layer) is MultiheadAttention
            found = layer(q, k, v, **call)
        assert type(layer) is nn.MultiheadAttention and "scale" not in vars(layer)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch_first", [True, False])
def test_causal_hints_single_sequences_and_dropout(batch_first):
    torch.manual_seed(0)
    layer = generic(nn.MultiheadAttention(15, 3, dropout=0.5, batch_first=batch_first))
    x, single = torch.randn(2, 5, 15), torch.randn(5, 15)
    causal = torch.triu(torch.ones(x.shape[1 if batch_first else 0], x.shape[1 if batch_first else 0]), 1).bool()
    for call in ({"need_weights": False}, {"need_weights": True}):
        expected = layer(x, x, x, attn_mask=causal, is_causal=True, **call)
        alone = layer(single, single, single, **call)
        with opened_attention(layer):
            torch.testing.assert_close(layer(x, x, x, attn_mask=causal, is_causal=True, **call), expected)
            torch.testing.assert_close(layer(single, single, single, **call), alone)
    with opened_attention(layer):
        with pytest.raises(RuntimeError, match="pass the mask"):
            layer(x, x, x, is_causal=True)
        layer.train()
        assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [o for o in OPTIONS if "kdim" not in o], ids=str)
def test_heads_and_head_dims_are_axes_of_their_own(options, need_weights, tmp_path):
    torch.manual_seed(0)
    model, x = Block(need_weights, **options).eval(), torch.randn(2, 5, 6)
    structure = proved_structure(model, x)
    assert {a.name: a.size for a in structure.prunable} == {
        "embed": 16,
        "attention[num_heads]": 4,
        "attention[head_dim]": 4,
        "attention": 4,
    }
    for axis in structure.prunable:  # each alone, then all at once
        plan = make_plan(structure, kept(structure, **{axis.name: [0, 2, 3]}))
        small = cut_copy(model, plan)
        assert type(small.attention) is MultiheadAttention
        if not need_weights and axis.name != "embed":  # weights are averaged over the heads that remain
            assert oracle_error(model, small, plan, x) < 1e-10
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.4))
    sc.save(pruned, tmp_path / "small.safetensors")
    again = sc.load(tmp_path / "small.safetensors", build=lambda: Block(need_weights, **options))
    torch.testing.assert_close(again(x), pruned.model(x), rtol=0, atol=0)
    assert again.attention.scale == 0.5 and type(model.attention) is nn.MultiheadAttention


def test_inputs_of_other_widths():
    torch.manual_seed(0)
    model = Block(False, cross=True, kdim=6, vdim=6).eval()
    x, memory = torch.randn(5, 2, 6), torch.randn(7, 2, 6)
    structure = proved_structure(model, (x, memory))
    plan = make_plan(structure, kept(structure, num_heads=[1, 2], embed=[0, 1, 2]))
    small = cut_copy(model, plan).attention
    assert small.q_proj_weight.shape == (8, 3) and small.k_proj_weight.shape == (8, 6)
    assert (small.embed_dim, small.kdim, small.num_heads) == (3, 6, 2)


def test_pytorchs_class_stays_where_it_can_express_the_widths():
    torch.manual_seed(0)
    model, x = Block(False, batch_first=True).eval(), torch.randn(2, 5, 6)
    structure = proved_structure(model, x)
    three = make_plan(structure, kept(structure, num_heads=[0, 1, 3], embed=range(12)))
    small = cut_copy(model, three)
    assert type(small.attention) is nn.MultiheadAttention and small.attention.embed_dim == 12
    assert "scale" not in vars(small.attention) and small(x)[0].shape == (2, 5, 3)
    twice = make_plan(proved_structure(small, x), {})
    assert type(cut_copy(small, twice).attention) is nn.MultiheadAttention
    # with 4 heads of 3 the sizes would fit, but PyTorch would divide by the root of 3, not of 4
    other = make_plan(structure, kept(structure, head_dim=range(3), attention=range(3), embed=range(12)))
    assert type(cut_copy(model, other).attention) is MultiheadAttention


@pytest.mark.parametrize("units", [[0, 1, 3], [0, 1]])
def test_encoders_do_not_take_fused_paths_that_cut_layers_lack(units):
    """In eval mode PyTorch packs padded sequences and runs one kernel per layer, which assumes the original widths."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1).eval(), torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    structure = proved_structure(model, (x,))
    small = cut_copy(model, make_plan(structure, kept(structure, num_heads=units))).eval()
    with torch.no_grad():
        fused = small(x, src_key_padding_mask=padding)
    plain = small(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fused[0], plain[0])
    torch.testing.assert_close(fused[1, :3], plain[1, :3])


def test_encoder_and_decoder_layers_lose_every_inner_width():
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 1, 32, batch_first=True).eval()
    x, y = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    pruned = sc.prune(model, (x, y), granularity="channel", budget=sc.Budget(macs=0.3))
    assert pruned.proofs[-1].ok and pruned.after.macs <= 0.3 * pruned.before.macs
    names = {axis.name.partition(".layers.0.")[2] for axis in pruned.structure.prunable}
    assert {"self_attn[num_heads]", "multihead_attn[head_dim]", "linear1"} <= names
    assert pruned.model.train()(x, y).shape == y.shape


def test_a_cut_layer_is_an_ordinary_module():
    """It copies, compiles, exports, changes its dtype, and has the state dict of PyTorch's layer."""
    torch.manual_seed(0)
    model, x = Block(False, batch_first=True).eval(), torch.randn(2, 5, 6)
    small = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.5)).model
    assert type(small.attention) is MultiheadAttention and isinstance(small.attention, nn.MultiheadAttention)
    assert small.state_dict().keys() == model.state_dict().keys()
    expected = small(x)[0]
    torch.testing.assert_close(copy.deepcopy(small)(x)[0], expected)
    torch.testing.assert_close(torch.compile(small, backend="eager")(x)[0], expected)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x)[0], expected)
    assert small.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16


def test_subclasses_of_the_layer_are_left_alone():
    class Own(nn.MultiheadAttention):
        pass

    model = Block(False)
    model.attention = Own(16, 4)
    structure = sc.trace(model.eval(), torch.randn(2, 5, 6))
    assert type(model.attention) is Own and structure.verify(model).ok
    assert not any("head_dim" in axis.name for axis in structure.prunable)
