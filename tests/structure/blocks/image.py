"""Blocks on images (n, c, h, w), signals (n, c, l) and volumes (n, c, d, h, w)."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from tests.structure.blocks import block
from torch import Tensor, nn

from secateur.testing.toys import DenseLayer, InvertedResidual, SqueezeExcite


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def activation(r: Random) -> nn.Module:
    return r.choice([nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.Mish, nn.ELU])()


@block("image", least=1.0)
def convolution(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 9)
    layers = [nn.Conv2d(width, out, r.choice([1, 3]), padding="same", bias=r.random() < 0.5), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers, activation(r)), out


@block("image", least=1.0)
def residual(width: int, r: Random) -> tuple[nn.Module, int]:
    hidden = r.randint(2, 7)
    inner = nn.Sequential(
        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, width, 1)
    )
    return Residual(inner), width


@block("image", least=1.0)
def inverted_residual(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.choice([width, r.randint(3, 7)])
    return InvertedResidual(width, out, 2, 1), out


@block("image", least=1.0)
def dense(width: int, r: Random) -> tuple[nn.Module, int]:
    growth = r.randint(2, 6)
    return DenseLayer(width, growth), width + growth


@block("image", least=1.0)
def grouped(width: int, r: Random) -> tuple[nn.Module, int]:
    groups, inner, outer = r.randint(2, 3), r.randint(1, 3), r.randint(1, 3)
    layers = (
        nn.Conv2d(width, groups * inner, 1),
        nn.ReLU(),
        nn.Conv2d(groups * inner, groups * outer, 3, 1, 1, 1, groups),
    )
    return nn.Sequential(*layers), groups * outer


@block("image", least=1.0)
def depthwise(width: int, r: Random) -> tuple[nn.Module, int]:
    times = r.randint(1, 2)
    return nn.Sequential(nn.Conv2d(width, times * width, 3, padding=1, groups=width), nn.Hardswish()), times * width


@block("image", least=1.0)
def transposed(width: int, r: Random) -> tuple[nn.Module, int]:
    if r.random() < 0.5:
        return nn.Sequential(nn.ConvTranspose2d(width, width, 3, padding=1, groups=width), nn.ReLU()), width
    groups, out = r.randint(1, 2), r.randint(2, 4)
    layers = nn.Conv2d(width, 3 * groups, 1), nn.ConvTranspose2d(3 * groups, out * groups, 3, padding=1, groups=groups)
    return nn.Sequential(*layers), out * groups


class Shuffle(nn.Module):
    """Split, a branch, concatenation and a channel shuffle, as in ShuffleNet."""

    def __init__(self, half: int, spelling: str) -> None:
        super().__init__()
        self.half, self.spelling = half, spelling
        self.branch = nn.Sequential(nn.Conv2d(half, half, 1), nn.BatchNorm2d(half), nn.ReLU())
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "chunk":
            left, right = x.chunk(2, dim=1)
        elif self.spelling == "split":
            left, right = torch.split(x, self.half, dim=1)
        else:
            left, right = x[:, : self.half], x[:, self.half :]
        joined = torch.cat([left, self.branch(right)], 1)
        if self.spelling != "chunk":
            return self.shuffle(joined)
        n, c, h, w = joined.shape
        return joined.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@block("image", least=1.0)
def shuffle(width: int, r: Random) -> tuple[nn.Module, int]:
    half = r.randint(2, 4)
    return nn.Sequential(nn.Conv2d(width, 2 * half, 1), Shuffle(half, r.choice(["chunk", "split", "slice"]))), 2 * half


@block("image", least=1.0)
def group_norm(width: int, r: Random) -> tuple[nn.Module, int]:
    groups, inner = r.randint(1, 3), r.randint(2, 3)
    out = groups * inner
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(groups, out), activation(r)), out


@block("image", least=1.0)
def instance_norm(width: int, r: Random) -> tuple[nn.Module, int]:
    return nn.Sequential(
        nn.InstanceNorm2d(width, affine=True, track_running_stats=r.random() < 0.5), nn.PReLU(width)
    ), width


@block("image", least=1.0)
def squeeze_excite(width: int, r: Random) -> tuple[nn.Module, int]:
    return SqueezeExcite(width, r.randint(2, 4)), width


@block("image", least=1.0)
def pixel_shuffle(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(2, 4)
    return nn.Sequential(nn.Conv2d(width, 4 * out, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)), out


@block("image", least=1.0)
def pixel_unshuffle(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 6)
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * width, out, 1), nn.Upsample(scale_factor=2)), out


@block("image", least=1.0)
def normed_weight(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 6)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(width, out, 3, padding=1))
    return nn.Sequential(conv, nn.ReLU()), out


class StandardizedConv2d(nn.Conv2d):
    """Kernels are standardized over their inputs at every call."""

    spelling = "batch_norm"

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "batch_norm":  # NFNet
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        else:  # BiT
            variance, mean = torch.var_mean(self.weight, [1, 2, 3], keepdim=True, unbiased=False)
            weight = (self.weight - mean) / torch.sqrt(variance + 1e-8)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


@block("image", least=1.0)
def standardized(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 6)
    conv = StandardizedConv2d(width, out, 3, padding=1)
    conv.spelling = r.choice(["batch_norm", "var_mean"])
    return nn.Sequential(conv, nn.ReLU()), out


class PaddingShortcut(nn.Module):
    """The shortcut of the first residual networks: new channels start as zeros."""

    def __init__(self, width: int, more: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width + 2 * more, 3, padding=1)
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.pad(x, (0, 0, 0, 0, self.more, self.more)) + self.conv(x))


@block("image", least=1.0)
def padding_shortcut(width: int, r: Random) -> tuple[nn.Module, int]:
    more = r.randint(1, 2)
    return PaddingShortcut(width, more), width + 2 * more


class ConvNeXt(nn.Module):
    """Depthwise convolution, LayerNorm and a perceptron in channels-last form, LayerScale, optionally GRN."""

    def __init__(self, width: int, hidden: int, global_response: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.scale = nn.Parameter(torch.zeros(hidden)) if global_response else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = F.gelu(self.up(y))
        if self.scale is not None:
            norm = y.norm(p=2, dim=(1, 2), keepdim=True)
            y = y + self.scale * y * (norm / (norm.mean(-1, keepdim=True) + 1e-6))
        return x + (self.gamma * self.down(y)).permute(0, 3, 1, 2)


@block("image", least=1.0)
def convnext(width: int, r: Random) -> tuple[nn.Module, int]:
    return ConvNeXt(width, r.randint(3, 8), r.random() < 0.5), width


class UnfoldFold(nn.Module):
    """A convolution by im2col, and col2im back."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(width * 4, out * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 2, stride=2)
        return F.fold(self.mix(columns).relu(), x.shape[-2:], 2, stride=2)


@block("image", least=1.0)
def unfold_fold(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(2, 4)
    return UnfoldFold(width, out), out


class PatchMerging(nn.Module):
    """Four neighbours become one token of four times the width, as in Swin; up again to keep the size."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        y = self.reduction(self.norm(x)).permute(0, 3, 1, 2)
        return F.interpolate(y, scale_factor=2, mode="bilinear")


@block("image", least=1.0)
def patch_merging(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 6)
    return PatchMerging(width, out), out


class WindowAttention(nn.Module):
    """Attention in shifted windows with a table of relative position biases, as in Swin."""

    def __init__(self, width: int, heads: int, head_dim: int, window: int = 2) -> None:
        super().__init__()
        self.heads, self.head_dim, self.window, self.scale = heads, head_dim, window, head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * heads * head_dim), nn.Linear(heads * head_dim, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(x.permute(0, 2, 3, 1), (-1, -1), (1, 2))
        n, h, w, c = y.shape
        s = self.window
        y = y.view(n, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        b, tokens, _ = y.shape
        q, k, v = self.qkv(y).reshape(b, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1)
        weights = (q * self.scale @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        y = self.proj((weights @ v).transpose(1, 2).reshape(b, tokens, -1))
        y = y.view(n, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return x + torch.roll(y, (1, 1), (1, 2)).permute(0, 3, 1, 2)


@block("image", least=0.85)
def window_attention(width: int, r: Random) -> tuple[nn.Module, int]:
    return WindowAttention(width, r.randint(2, 3), r.randint(2, 3)), width


class GlobalFilter(nn.Module):
    """A filter in the frequency domain, as in GFNet: complex numbers are frozen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 5, width, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho")
        y = torch.fft.irfft2(y * torch.view_as_complex(self.weight), s=x.shape[2:], dim=(1, 2), norm="ortho")
        return y.permute(0, 3, 1, 2)


@block("image", least=0.0, local=False)
def global_filter(width: int, r: Random) -> tuple[nn.Module, int]:
    return GlobalFilter(width), width


@block("image", least=1.0)
def pooling(width: int, r: Random) -> tuple[nn.Module, int]:
    down = r.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), nn.AdaptiveMaxPool2d(4)])
    up = nn.Upsample(scale_factor=2, mode=r.choice(["nearest", "bilinear", "bicubic"]))
    return nn.Sequential(down, nn.Conv2d(width, width, 1), up), width


class Fork(nn.Module):
    """Branches of unequal width, concatenated, as in Inception."""

    def __init__(self, width: int, outs: list[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(width, out, 1 + 2 * (i % 2), padding="same") for i, out in enumerate(outs)
        )
        self.norm = nn.BatchNorm2d(sum(outs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat([branch(x) for branch in self.branches], dim=1)))


@block("image", least=1.0)
def fork(width: int, r: Random) -> tuple[nn.Module, int]:
    outs = [r.randint(2, 4) for _ in range(r.randint(2, 3))]
    return Fork(width, outs), sum(outs)


@block("signal", least=1.0)
def convolution_1d(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 6)
    layers = (
        nn.Conv1d(width, out, 3, padding=1),
        nn.BatchNorm1d(out),
        nn.GELU(),
        nn.Conv1d(out, out, 3, padding=1, groups=out),
    )
    return nn.Sequential(*layers), out


@block("signal", least=1.0)
def transposed_1d(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 6)
    layers = nn.ConvTranspose1d(width, out, 2, 2), nn.ReLU(), nn.AvgPool1d(2), nn.InstanceNorm1d(out, affine=True)
    return nn.Sequential(*layers), out


@block("signal", least=1.0)
def gated_1d(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(2, 5)
    return nn.Sequential(nn.Conv1d(width, 2 * out, 3, padding=1), nn.GLU(1)), out


@block("volume", least=1.0)
def convolution_3d(width: int, r: Random) -> tuple[nn.Module, int]:
    out = r.randint(3, 5)
    layers = (
        nn.Conv3d(width, out, 3, padding=1),
        nn.BatchNorm3d(out),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Upsample(scale_factor=2),
    )
    return nn.Sequential(*layers), out


@block("volume", least=1.0)
def factorized_3d(width: int, r: Random) -> tuple[nn.Module, int]:
    hidden, out = r.randint(2, 4), r.randint(3, 5)
    layers = (
        nn.Conv3d(width, hidden, (1, 3, 3), padding=(0, 1, 1)),
        nn.SiLU(),
        nn.Conv3d(hidden, out, (3, 1, 1), padding=(1, 0, 0)),
    )
    return nn.Sequential(*layers, nn.AvgPool3d(2), nn.ConvTranspose3d(out, out, 2, 2, groups=out)), out
