"""A tiny network for each operation that the rules know, with sizes that differ and with sizes that are all alike.

Where all sizes are equal, a rule that swaps two dims still unifies: only a proof can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = tuple[str, nn.Module, Any]


class Model(nn.Module):
    """``a`` makes hidden units, a function works on them, ``o`` reads them.

    With `up`, the rows are units too: mixed from the rows of the input before, and mixed by `down` after.
    """

    def __init__(self, into: nn.Module, function: Callable[..., Tensor], out: nn.Module, **more: Any) -> None:
        super().__init__()
        self.a, self.function, self.o = into, function, out
        self.up = self.down = None
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(self, self.hidden(x))
        if self.down is not None and y.dim() == 3:
            y = self.down(y.transpose(1, 2)).transpose(1, 2)
        return self.o(y)  # type: ignore[no-any-return]

    def hidden(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        return y if self.up is None else self.up(y.transpose(1, 2)).transpose(1, 2)

    def with_rows_as_units(self, x: Tensor, rows: int) -> Model:
        self.up = nn.Linear(x.shape[1], rows)
        self.down = nn.Linear(self.function(self, self.hidden(x)).shape[1], 2)
        return self


class Space(nn.Module):
    """Lets height and width be units, too: makes them from the pixels of the input."""

    def __init__(self, pixels: int, height: int, width: int) -> None:
        super().__init__()
        self.mix, self.height, self.width = nn.Linear(pixels, height * width), height, width

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mix(x.flatten(2))
        return y.unflatten(2, (self.height, self.width))


def _index(*sizes: int, below: int) -> Tensor:
    return torch.randint(0, below, sizes)


def linear_cases(b: int, n: int, c: int, d: int, all_units: bool) -> Iterator[Case]:
    """Operations on (b, n, c); rows are units too, if asked."""
    x = torch.randn(b, 2 if all_units else n, 3)

    def case(name: str, function: Callable[..., Tensor], width: int = c, into: int = c, **more: Any) -> Case:
        model = Model(nn.Linear(3, into), function, nn.Linear(width, 3), **more)
        return name, model.with_rows_as_units(x, n) if all_units else model, x

    p = nn.Parameter
    yield case(
        "baddbmm",
        lambda s, h: torch.baddbmm(s.w, h, s.v.expand(b, -1, -1)),
        d,
        w=p(torch.randn(1, d)),
        v=p(torch.randn(1, c, d)),
    )
    yield case("mv", lambda s, h: h * (h.flatten(0, 1) @ s.w).view(b, n, 1), w=p(torch.randn(c)))
    yield case("dot", lambda s, h: h * torch.dot(s.v, s.w), v=p(torch.randn(d)), w=p(torch.randn(d)))
    yield case("vdot", lambda s, h: h * torch.vdot(s.v, s.w), v=p(torch.randn(d)), w=p(torch.randn(d)))
    yield case("mm of activations", lambda s, h: (h[0] @ s.w.t()) @ s.w + h, w=p(torch.randn(c, d).t()))
    yield case("copy", lambda s, h: torch.zeros(b, n, c).copy_(h) * s.w, w=p(torch.randn(c)))
    yield case(
        "copy in part",
        lambda s, h: h.clone().index_copy_(1, torch.tensor([1]), s.w[None, None].expand(b, 1, -1)),
        w=p(torch.randn(c)),
    )
    yield case("fill", lambda s, h: torch.zeros_like(h).fill_(2.0) * h + torch.full_like(h, 0.5))
    yield case("prelu with one slope", lambda s, h: s.f(h), f=nn.PReLU())
    yield case("prelu on positions", lambda s, h: s.f(h), f=nn.PReLU(n))
    yield case(
        "new tensors",
        lambda s, h: (
            h + h.new_ones(b, n, h.shape[-1]) * s.w + torch.zeros(s.a.out_features) + torch.full((h.shape[-1],), 2.0)
        ),
        w=p(torch.randn(c)),
    )
    yield case("arange", lambda s, h: h + torch.arange(c))
    yield case("random", lambda s, h: h + 0 * torch.rand_like(h))
    yield case("dropout", lambda s, h: s.f(h), f=nn.Dropout(0.5))
    yield case("triangle", lambda s, h: h + s.w.tril() @ h, w=p(torch.randn(n, n)))
    yield case("triangle of units", lambda s, h: h @ s.w.triu(), w=p(torch.randn(c, c)))
    yield case("item", lambda s, h: h * s.scale.item(), scale=torch.tensor(2.0))
    yield case("embedding", lambda s, h: h + s.e(s.i), e=nn.Embedding(7, c), i=_index(b, n, below=7))
    yield case("index_select", lambda s, h: h + s.w.index_select(0, s.i), w=p(torch.randn(7, c)), i=_index(n, below=7))
    yield case("index_select of units", lambda s, h: h.index_select(-1, s.i), d, i=_index(d, below=c))
    yield case("index", lambda s, h: h + s.w[s.i], w=p(torch.randn(7, c)), i=_index(b, n, below=7))
    yield case(
        "index behind", lambda s, h: h + s.w[:, s.i].permute(1, 2, 0), w=p(torch.randn(c, 7)), i=_index(b, n, below=7)
    )
    yield case("index apart", lambda s, h: h + s.w[s.i, :, s.i], w=p(torch.randn(7, c, 7)), i=_index(b, n, below=7))
    yield case(
        "index by mask", lambda s, h: h + s.w[s.m].sum(0), w=p(torch.randn(3, c)), m=torch.tensor([True, False, True])
    )
    yield case(
        "index by mask of units", lambda s, h: h + h[:, :, s.m].sum(-1, keepdim=True), m=torch.arange(c) % 2 == 0
    )
    yield case(
        "index_put",
        lambda s, h: torch.index_put(h.flatten(0, 1), (s.i,), s.w).view_as(h),
        w=p(torch.randn(c)),
        i=torch.tensor([0, 1]),
    )
    yield case("index_put rows", _write_rows, w=p(torch.randn(2, c)), i=torch.tensor([0, 1]))
    yield case(
        "index_put one value",
        lambda s, h: torch.index_put(h, (s.i,), s.w),
        w=p(torch.randn(1, c)),
        i=torch.tensor([0, 1]),
    )
    yield case(
        "scatter",
        lambda s, h: h.scatter(1, s.i.expand(b, 1, c), s.w.expand(b, 1, -1)),
        w=p(torch.randn(c)),
        i=_index(b, 1, 1, below=n),
    )
    yield case(
        "scatter_add",
        lambda s, h: torch.zeros_like(h).scatter_add(1, s.i.expand_as(h), h * s.w),
        w=p(torch.randn(c)),
        i=_index(b, n, 1, below=n),
    )
    yield case(
        "scatter units",
        lambda s, h: h.scatter_add(2, s.i.expand(b, n, -1), h[..., :1] * s.w),
        w=p(torch.randn(1)),
        i=_index(1, 1, 1, below=c),
    )
    yield case(
        "index_add",
        lambda s, h: h.index_add(1, s.i, s.w[None, None].expand(b, n, -1) * h),
        w=p(torch.randn(c)),
        i=_index(n, below=n),
    )
    yield case("gather", lambda s, h: h.gather(1, s.i.expand_as(h)) + h, i=_index(b, n, 1, below=n))
    yield case(
        "gather in part", lambda s, h: h.gather(1, s.i).repeat(1, n, 1), d, i=_index(b, 1, d, below=n), into=d + 1
    )
    yield case("gather units", lambda s, h: h.gather(2, s.i.expand(b, n, d)), d, i=_index(1, 1, d, below=c))
    yield case("swapaxes", lambda s, h: s.l(h.swapaxes(1, -1)).transpose(-2, 2), l=nn.Linear(n, n))
    yield case("matrix.T", lambda s, h: (s.w.T @ h.transpose(1, 2)).transpose(1, 2) + h, w=p(torch.randn(c, c)))
    yield case("transpose of a scalar", lambda s, h: h * s.w.transpose(0, 0), w=p(torch.tensor(2.0)))
    yield case(
        "squeeze",
        lambda s, h: h.unsqueeze(0).unsqueeze(2).squeeze() * s.w.squeeze(0).squeeze(),
        w=p(torch.randn(1, c, 1)),
    )
    yield case("squeeze nothing", lambda s, h: h.squeeze(1) * s.w.squeeze(), w=p(torch.tensor(1.5)))
    yield case("squeeze twice", lambda s, h: h[:, None, :, None].squeeze((1, 3)))
    yield case(
        "expand_as",
        lambda s, h: h * s.w.view(1, 1, -1).expand_as(h) + s.v.expand_as(h),
        w=p(torch.randn(c)),
        v=p(torch.randn(1)),
    )
    yield case(
        "expand to a width",
        lambda s, h: s.v.expand(b, n, s.a.out_features) * h + s.v.expand(b, n, h.shape[-1]),
        v=p(torch.randn(1)),
    )
    yield case("expand by number", lambda s, h: s.v.expand(b, n, c) * h, v=p(torch.randn(1)))
    yield case("broadcast_to", lambda s, h: torch.broadcast_to(s.w, (b, n, c)) * h, w=p(torch.randn(c)))
    yield case("repeat", lambda s, h: h.repeat(1, 1, 2), 2 * c)
    yield case("repeat in front", lambda s, h: h * s.w.repeat(b, n, 1), w=p(torch.randn(c)))
    yield case("cat", lambda s, h: torch.cat([h, s.l(h), torch.zeros(0)], -1), c + d, l=nn.Linear(c, d))
    yield case(
        "cat of rows",
        lambda s, h: torch.cat([h, s.w.expand(b, 1, -1)], 1).sum(1, keepdim=True),
        w=p(torch.randn(1, 1, c)),
    )
    yield case("stack", lambda s, h: torch.stack([h, s.l(h)], -1).flatten(2), 2 * c, l=nn.Linear(c, c))
    yield case("stack in front", lambda s, h: torch.stack([h, s.l(h)]).sum(0), l=nn.Linear(c, c))
    yield case("split", lambda s, h: h.split([1, s.k], -1)[1] * h[..., :1], c - 1, k=c - 1)
    yield case("split by rows", lambda s, h: torch.cat(h.split(1, 1)[::-1], 1) + h)
    yield case("chunk", lambda s, h: torch.cat([t.sin() if i else t for i, t in enumerate(h.chunk(2, -1))], -1))
    yield case("slice", lambda s, h: h[..., 1 : s.k], c - 2, k=c - 1)
    yield case("slice of rows", lambda s, h: h[:, 1:] + h[:, :-1])
    yield case("slice with a step", lambda s, h: h[..., ::2] + 0 * h[..., :1], (c + 1) // 2)
    yield case("select", lambda s, h: h * h[..., 0, None] + h.select(1, 0)[:, None])
    yield case("unbind", lambda s, h: sum(h.unbind(1))[:, None] * h)
    yield case("pad", lambda s, h: F.pad(s.l(h), (1, 2)) * F.pad(h, (1, 2)), c + 3, l=nn.Linear(c, c))
    yield case("crop", lambda s, h: F.pad(h, (-1, 0)), c - 1)
    yield case("crop and pad", lambda s, h: F.pad(h, (0, 0, 1, 0))[:, :n] + F.pad(h, (0, 0, 0, 0)))
    yield case("flip of rows", lambda s, h: h.flip(1) + h)
    yield case("flip of units", lambda s, h: h.flip(-1) + s.w, w=p(torch.randn(c)))
    yield case("roll", lambda s, h: h.roll(1, 1) + h.roll(1, 2))
    yield case("reflection", lambda s, h: F.pad(h, (1, 1), mode="reflect"), c + 2)
    yield case("roll of everything", lambda s, h: h.roll(1))
    yield case("layer norm over two", lambda s, h: s.f(h), f=nn.LayerNorm([n, c]))
    yield case("layer norm by number", lambda s, h: F.layer_norm(h, (c,)))
    yield case("layer norm", lambda s, h: s.f(h), f=nn.LayerNorm(c))
    yield case("weight norm", lambda s, h: s.f(h), d, f=nn.utils.parametrizations.weight_norm(nn.Linear(c, d)))
    yield case(
        "weight norm of columns",
        lambda s, h: s.f(h),
        d,
        f=nn.utils.parametrizations.weight_norm(nn.Linear(c, d), dim=1),
    )
    for name, reduce in REDUCTIONS.items():
        yield case(name, lambda s, h, reduce=reduce: h * reduce(h))
        yield case(
            f"{name}, used", lambda s, h, reduce=reduce: h * s.l(reduce(h, 1).expand(b, 1, -1)), l=nn.Linear(c, c)
        )
    yield case("mean of all", lambda s, h: h * h.mean() + h.sum() + h.square().sum().sqrt())
    yield case("mean of two", lambda s, h: h * h.mean((0, -1), keepdim=True))
    yield case("mean, dropped", lambda s, h: h.mean(1), c)
    yield case("softmax", lambda s, h: h.softmax(-1) + h.log_softmax(1))
    yield case("argmax", lambda s, h: h * h.argmax(-1, keepdim=True) + h.max(1)[0][:, None])
    yield case("argmax of all", lambda s, h: h * h.argmax())
    yield case("sort of rows", lambda s, h: h.sort(1)[0] + h.cumsum(1))
    yield case("topk", lambda s, h: h.topk(2)[0], 2)
    yield case("maximum", lambda s, h: torch.max(h, s.w), w=p(torch.randn(c)))
    yield case("sort of units", lambda s, h: h.sort()[0] * s.w, w=p(torch.randn(c)))
    yield case("view as another type", lambda s, h: h * (h > 0).view(torch.uint8))
    yield case("reshape to rows", lambda s, h: h.reshape(b * n, -1) * s.w, w=p(torch.randn(c)))
    yield case("heads", lambda s, h: (h.view(b, n, s.heads, -1) * s.w).flatten(2), heads=2, w=p(torch.randn(2, c // 2)))
    yield case("mixed up", lambda s, h: h.transpose(0, 1).reshape(b, n, -1), c)
    yield case("units and rows", lambda s, h: s.l(h.transpose(1, 2).reshape(b, -1)), l=nn.Linear(n * c, c))
    yield case(
        "attention with a mask",
        lambda s, h: F.scaled_dot_product_attention(s.q(h), h, s.l(h), attn_mask=s.m, scale=0.5),
        d,
        q=nn.Linear(c, c),
        l=nn.Linear(c, d),
        m=p(torch.randn(1, n)),
    )
    yield case(
        "attention of heads",
        _attention,
        2 * d,
        q=nn.Linear(c, 2 * d),
        k=nn.Linear(c, 2 * d),
        l=nn.Linear(c, 2 * d),
        m=p(torch.randn(2, 1, n)),
        e=d,
    )
    yield case(
        "attention to learned keys", _learned, d, q=nn.Linear(c, c), k=p(torch.randn(n, c)), l=p(torch.randn(n, d))
    )
    for kv, groups in ((2, 3), (2, 2)):
        widths = {"q": nn.Linear(c, kv * groups * d), "k": nn.Linear(c, kv * d), "l": nn.Linear(c, kv * d)}
        yield case(f"grouped queries {groups}", _grouped_queries, kv * groups * d, **widths, e=d)
    yield case("convolution over rows", lambda s, h: s.f(h), f=nn.Conv1d(n, n, 1))
    yield case("convolution over units", lambda s, h: s.f(h), f=nn.Conv1d(n, n, 3, padding=1))
    yield case("strided convolution over units", lambda s, h: s.f(h), c // 2, f=nn.Conv1d(n, n, 2, stride=2))
    yield case("einsum", lambda s, h: torch.einsum("bnc,cd->bnd", h, s.w), d, w=p(torch.randn(c, d)))
    yield case("where", lambda s, h: torch.where(h > 0, h, s.w), w=p(torch.randn(c)))
    yield case("outer", lambda s, h: (h[..., None] * s.w).flatten(2), c * d, w=p(torch.randn(d)))
    yield case("cumsum of units", lambda s, h: h.cumsum(-1))
    yield case("histogram", lambda s, h: h * torch.histc(h, c).sum())
    yield case("smallest units", lambda s, h: h.topk(2, largest=False)[0], 2)
    yield case("chosen units", _chosen, d, w=p(torch.randn(c, d)))
    yield case("looked up by what is chosen", _looked_up, d, w=p(torch.randn(c, d)))
    yield case("unknown", lambda s, h: h + torch.fft.fft(h).real)
    yield case("strides", lambda s, h: h.as_strided((b, n, c), (n * c, c, 1)))


def _chosen(s: Any, h: Tensor) -> Tensor:
    chosen = h.topk(2)[1]
    largest: Tensor = (h * torch.zeros_like(h).scatter(-1, chosen, 1.0)) @ s.w
    return largest + h.sigmoid().gather(-1, chosen).sum(-1, keepdim=True)


def _looked_up(s: Any, h: Tensor) -> Tensor:
    chosen = h.topk(2)[1]
    by_choice = s.w[chosen].sum(-2) + F.embedding(chosen[..., 0], s.w)
    return by_choice + s.w.index_select(0, chosen.flatten()).mean(0)


def _experts(s: Any, h: Tensor) -> Tensor:
    return _through_experts(s, h, lambda chosen: torch.histc(chosen, s.units, 0, s.units - 1))


def _experts_by_literals(s: Any, h: Tensor) -> Tensor:
    return _through_experts(s, h, lambda chosen: torch.histc(chosen, *((5, 0, 4) if len(s.w) == 5 else (8, 0, 7))))


def _through_experts(s: Any, h: Tensor, count: Callable[[Tensor], Tensor]) -> Tensor:
    weight, chosen = s.router(h).softmax(-1).topk(2)
    named, order = chosen.flatten().sort()
    ends = count(named.float()).cumsum(0, dtype=torch.int32)
    rows = torch._grouped_mm(h[order // 2], s.w, offs=ends) + s.bias[named]
    return (rows * weight.flatten()[order, None])[order.argsort()].view(-1, 2, 8).sum(1)


def _noisy(s: Any, h: Tensor) -> Tensor:
    y: Tensor = s.f(h)[0]
    return torch.where(torch.rand_like(y) < 0.5, y, s.token) if s.training else y


def _write_rows(s: Any, h: Tensor) -> Tensor:
    h = h.clone()
    h[:, s.i] = s.w
    return h


def _attention(s: Any, h: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, s.e)).transpose(1, 2) for t in (s.q(h), s.k(h), s.l(h)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=s.m, scale=0.5).transpose(1, 2).flatten(2)


def _learned(s: Any, h: Tensor) -> Tensor:
    keys, values = (t.expand(h.shape[0], -1, -1) for t in (s.k, s.l))
    return F.scaled_dot_product_attention(s.q(h), keys, values, scale=0.5)


def _grouped_queries(s: Any, h: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (-1, s.e)).transpose(1, 2) for t in (s.q(h), s.k(h), s.l(h)))
    return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True).transpose(1, 2).flatten(2)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": lambda h, dim=-1: h.mean(dim, keepdim=True),
    "sum": lambda h, dim=-1: h.sum(dim, keepdim=True),
    "nansum": lambda h, dim=-1: h.nansum(dim, keepdim=True),
    "prod": lambda h, dim=-1: h.prod(dim, keepdim=True),
    "amax": lambda h, dim=-1: h.amax(dim, keepdim=True),
    "amin": lambda h, dim=-1: h.amin(dim, keepdim=True),
    "logsumexp": lambda h, dim=-1: h.logsumexp(dim, keepdim=True),
    "norm": lambda h, dim=-1: h.norm(dim=dim, keepdim=True),
    "var": lambda h, dim=-1: h.var(dim, keepdim=True),
    "std": lambda h, dim=-1: h.std(dim, keepdim=True),
    "var_mean": lambda h, dim=-1: sum(torch.var_mean(h, dim, keepdim=True)),
    "std_mean": lambda h, dim=-1: sum(torch.std_mean(h, dim, keepdim=True)),
    "any": lambda h, dim=-1: (h > 1).any(dim, keepdim=True).to(h),
    "all": lambda h, dim=-1: (h > -1).all(dim, keepdim=True).to(h),
}


def image_cases(b: int, n: int, c: int, d: int, all_units: bool) -> Iterator[Case]:
    """Operations on (b, c, n, n); height and width are units too, if asked."""
    x = torch.randn(b, 3, n, n)

    def case(name: str, module: nn.Module, width: int = c, into: int = c) -> Case:
        first = nn.Conv2d(3, into, 1)
        if not all_units:
            return name, nn.Sequential(first, module, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)), x
        before = nn.Sequential(first, Space(n * n, n, n), module, nn.Flatten(2))
        return name, nn.Sequential(before, nn.Linear(before(x).shape[2], 2), nn.Flatten(), nn.Linear(2 * width, 3)), x

    yield case("convolution", nn.Conv2d(c, d, 3), d)
    yield case("convolution without bias", nn.Conv2d(c, d, 1, bias=False), d)
    yield case("grouped convolution", nn.Conv2d(2 * c, 2 * d, 3, padding=1, groups=2), 2 * d, 2 * c)
    yield case("depthwise convolution", nn.Conv2d(c, c, 3, padding=1, groups=c))
    yield case("transposed convolution", nn.ConvTranspose2d(c, d, 2, stride=2), d)
    yield case("grouped transposed convolution", nn.ConvTranspose2d(2 * c, 2 * d, 2, stride=2, groups=2), 2 * d, 2 * c)
    yield case("batch norm", nn.BatchNorm2d(c))
    yield case("instance norm", nn.InstanceNorm2d(c, affine=True))
    yield case("group norm", nn.GroupNorm(2, 2 * c), 2 * c, 2 * c)
    yield case("one group", nn.GroupNorm(1, c))
    yield case("prelu", nn.PReLU(c))
    yield case("pixel shuffle", nn.PixelShuffle(2), c, 4 * c)
    yield case("pixel unshuffle", nn.Sequential(nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2)), 4 * c)
    yield case("channel shuffle", nn.Sequential(nn.ChannelShuffle(2), nn.Conv2d(2 * c, c, 1)), c, 2 * c)
    yield case("max pool", nn.MaxPool2d(2))
    yield case(
        "pools with indices", nn.Sequential(nn.AdaptiveMaxPool2d(2), nn.Upsample(scale_factor=2, mode="bicubic"))
    )
    yield case("reflection", nn.ReflectionPad2d(1))
    yield case("glu", nn.GLU(1), c, 2 * c)
    yield case("flatten space", nn.Sequential(nn.Flatten(2), nn.Linear(n * n, d), nn.Unflatten(2, (d, 1))))
    name, model, x = case("channels last", nn.Conv2d(c, d, 1), d)
    yield name, model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def _turned(self: Any, hidden: Tensor) -> Tensor:
    """Rotary embeddings of a part of the units, as complex numbers."""
    plain, rotary = hidden.split([self.plain, hidden.shape[-1] - self.plain], -1)
    numbers = torch.view_as_complex(rotary.reshape(*rotary.shape[:-1], -1, 2))
    return torch.cat([plain, torch.view_as_real(numbers * self.turn).flatten(-2)], -1)


def cases() -> Iterator[Case]:
    """All cases in float64, in eval mode; the last number keeps each name apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i, sizes in enumerate([(2, 5, 4, 6), (4, 4, 4, 4)]):
            for all_units in (False, True):
                for make in (linear_cases, image_cases):
                    for name, model, x in make(*sizes, all_units):
                        yield f"{name} {i}{'+' if all_units else ''}", model.double().eval(), x.double()
        for i, (hidden, width) in enumerate([(4, 6), (4, 4)]):
            layers = {"f": nn.LSTM(width, hidden, bidirectional=i == 0), "batch": 2}
            recurrent = Model(nn.Linear(3, width), lambda s, h: s.f(h)[0], nn.Linear(hidden * (2 - i), 3), **layers)
            yield f"lstm {i}", recurrent.eval(), torch.randn(5 - i, 4, 3)
        layers = {"f": nn.LSTM(6, 4), "batch": 2, "token": nn.Parameter(torch.randn(4))}
        yield "training", Model(nn.Linear(3, 6), _noisy, nn.Linear(4, 3), **layers).eval(), torch.randn(5, 4, 3)
        ends = torch.tensor([3, 8], dtype=torch.int32)
        for i, (width, out) in enumerate([(8, 4), (8, 8)]):
            more = {"w": nn.Parameter(torch.randn(2, width, out)), "ends": ends}
            grouped = Model(
                nn.Linear(3, width), lambda s, h: torch._grouped_mm(h, s.w, offs=s.ends), nn.Linear(out, 3), **more
            )
            yield f"grouped matmul {i}", grouped.eval(), torch.randn(8, 3)
        for i, plain in enumerate([6, 4]):
            turn = nn.Parameter(torch.polar(torch.ones(2), torch.randn(2)), requires_grad=False)
            rotary = Model(nn.Linear(3, plain + 4), _turned, nn.Linear(plain + 4, 3), plain=plain, turn=turn)
            yield f"rotary {i}", rotary.double().eval(), torch.randn(4, 3, dtype=torch.float64)
        for i, units in enumerate([5, 8]):
            for name, function in (("experts", _experts), ("experts by literals", _experts_by_literals)):
                weights = {"w": nn.Parameter(torch.randn(units, 8, 8)), "bias": nn.Parameter(torch.randn(units, 8))}
                layers = {"router": nn.Linear(8, units), "units": units, **weights}
                yield (
                    f"{name} {i}",
                    Model(nn.Linear(3, 8), function, nn.Linear(8, 3), **layers).eval(),
                    torch.randn(20, 3),
                )
        rows = Model(
            nn.Linear(3, 8), lambda s, h: torch._grouped_mm(h.t(), h, offs=s.ends).sum(0), nn.Linear(8, 3), ends=ends
        )
        yield "grouped matmul of two activations", rows.eval(), torch.randn(8, 3)
