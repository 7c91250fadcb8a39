"""Attention in the spellings that people use, on sequences (n, l, c)."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from tests.structure.blocks import block
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, spelling: str, bias: Tensor | None = None) -> Tensor:
    """(b, h, l, e) x (b, h, s, e) x (b, h, s, v) -> (b, h, l, v)."""
    if spelling == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    if spelling == "einsum":
        scores = torch.einsum("bhle,bhse->bhls", q, k) * scale
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return torch.einsum("bhls,bhsv->bhlv", weights, v)
    scores = q @ k.transpose(-2, -1) * scale
    return (scores if bias is None else scores + bias).softmax(-1) @ v


SPELLINGS = ["fused", "matmul", "einsum"]


class FusedProjection(nn.Module):
    """One projection for queries, keys and values, and five ways to take it apart."""

    def __init__(self, width: int, heads: int, head_dim: int, taken: str, spelling: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.inner, self.scale = heads, head_dim, heads * head_dim, head_dim**-0.5
        self.taken, self.spelling = taken, spelling
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * self.inner)
        self.proj = nn.Linear(self.inner, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        y = self.qkv(self.norm(x))
        if self.taken == "unbind":
            q, k, v = y.reshape(n, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.taken == "index":
            y = y.view(n, length, 3, self.heads, self.head_dim).transpose(1, 3)
            q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        else:
            if self.taken == "chunk":
                pieces = y.chunk(3, dim=-1)
            elif self.taken == "split":
                pieces = y.split(self.inner, dim=-1)
            else:
                pieces = y[..., : self.inner], y[..., self.inner : 2 * self.inner], y[..., 2 * self.inner :]
            q, k, v = (piece.view(n, length, self.heads, self.head_dim).transpose(1, 2) for piece in pieces)
        y = attend(q, k, v, self.scale, self.spelling)
        return x + self.proj(y.transpose(1, 2).flatten(2))


@block("sequence", least=1.0)
def fused_qkv(width: int, r: Random) -> tuple[nn.Module, int]:
    taken = r.choice(["unbind", "index", "chunk", "split", "slice"])
    return FusedProjection(width, r.randint(2, 3), r.randint(2, 4), taken, r.choice(SPELLINGS)), width


class GroupedQueries(nn.Module):
    """Fewer heads for keys and values than for queries, with or without rotary embeddings."""

    def __init__(self, width: int, kv: int, groups: int, head_dim: int, repeat: str, rotary: str) -> None:
        super().__init__()
        self.kv, self.groups, self.head_dim, self.repeat, self.rotary = kv, groups, head_dim, repeat, rotary
        self.scale = head_dim**-0.5
        self.q = nn.Linear(width, kv * groups * head_dim, bias=False)
        self.k, self.v = nn.Linear(width, kv * head_dim), nn.Linear(width, kv * head_dim, bias=False)
        self.o = nn.Linear(kv * groups * head_dim, width)
        self.register_buffer("frequencies", 1.0 / 100 ** (torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (p(x).view(n, length, -1, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = self.rotate(q), self.rotate(k)
        if self.repeat == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)
            return x + self.o(y.transpose(1, 2).reshape(n, length, -1))
        k, v = (self.repeated(t) for t in (k, v))
        return x + self.o(attend(q, k, v, self.scale, "matmul").transpose(1, 2).reshape(n, length, -1))

    def repeated(self, x: Tensor) -> Tensor:
        if self.repeat == "repeat_interleave":
            return x.repeat_interleave(self.groups, dim=1)
        n, kv, length, head_dim = x.shape
        return x[:, :, None].expand(n, kv, self.groups, length, head_dim).reshape(n, -1, length, head_dim)

    def rotate(self, x: Tensor) -> Tensor:
        """Halves: (i, i + d/2) are a pair (Llama); interleaved: (2i, 2i + 1) are one (GPT-J)."""
        if self.rotary == "none":
            return x
        angles = torch.outer(torch.arange(x.shape[-2]).to(x), self.frequencies)
        if self.rotary == "halves":
            angles = torch.cat([angles, angles], -1)
            left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
            turned = torch.cat([-right, left], -1)
        else:
            angles = torch.stack([angles, angles], -1).flatten(-2)
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return x * angles.cos() + turned * angles.sin()


@block("sequence", least=0.45)
def grouped_queries(width: int, r: Random) -> tuple[nn.Module, int]:
    repeat = r.choice(["enable_gqa", "repeat_interleave", "expand"])
    rotary = r.choice(["none", "halves", "interleaved"])
    return GroupedQueries(width, r.randint(1, 3), r.randint(1, 2), r.choice([2, 4]), repeat, rotary), width


class ImageAttention(nn.Module):
    """The result is reshaped to the shape of the input, so the width is heads x head_dim."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads, self.scale = heads, head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, self.scale, "matmul").transpose(1, 2).reshape(n, length, width))


@block("sequence", least=1.0)
def image_attention(width: int, r: Random) -> tuple[nn.Module, int]:
    heads, head_dim = r.randint(2, 3), r.randint(2, 3)
    return nn.Sequential(nn.Linear(width, heads * head_dim), ImageAttention(heads, head_dim)), heads * head_dim


class RelativeBias(nn.Module):
    """Separate projections, and a bias for each head by the distance of two tokens, as in T5."""

    def __init__(self, width: int, heads: int, head_dim: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.head_dim, self.spelling = heads, head_dim, spelling
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, width, bias=False)
        self.bias = nn.Embedding(9, heads)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (p(x).view(n, -1, self.heads, self.head_dim).transpose(1, 2) for p in (self.q, self.k, self.v))
        at = torch.arange(length)
        distance = (at[None, :] - at[:, None]).clamp(-4, 4) + 4
        bias = self.bias(distance).permute(2, 0, 1)[None]
        y = attend(q, k, v, 1.0, self.spelling, bias)
        return x + self.o(y.transpose(1, 2).contiguous().view(n, length, self.heads * self.head_dim))


@block("sequence", least=0.9)
def relative_bias(width: int, r: Random) -> tuple[nn.Module, int]:
    return RelativeBias(width, r.randint(2, 3), r.randint(2, 3), r.choice(SPELLINGS)), width


class CoreAttention(nn.Module):
    """PyTorch's own layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


@block("sequence", least=1.0)
def core_attention(width: int, r: Random) -> tuple[nn.Module, int]:
    heads, head_dim = r.randint(2, 3), r.randint(2, 3)
    return nn.Sequential(nn.Linear(width, heads * head_dim), CoreAttention(heads * head_dim, heads)), heads * head_dim


class LinearAttention(nn.Module):
    """Keys and values are summed first; keys are normalized over the tokens, or over their width (cosine)."""

    def __init__(self, width: int, inner: int, out: int, cosine: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(width, out)
        self.o, self.cosine = nn.Linear(out, width), cosine

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k = (F.normalize(q, dim=-1), F.normalize(k, dim=-1)) if self.cosine else (q.softmax(-1), k.softmax(1))
        return x + self.o(torch.einsum("nle,nev->nlv", q, torch.einsum("nle,nlv->nev", k, v)))


@block("sequence", least=1.0)
def linear_attention(width: int, r: Random) -> tuple[nn.Module, int]:
    return LinearAttention(width, r.randint(2, 5), r.randint(2, 5), r.random() < 0.5), width
