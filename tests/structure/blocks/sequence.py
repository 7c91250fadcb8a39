"""Perceptrons, norms, recurrence, state spaces and experts on sequences (n, l, c)."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from tests.structure.blocks import block
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """As language models write it: statistics in a wide type."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float64)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def normalization(width: int, r: Random) -> nn.Module:
    return r.choice([nn.LayerNorm, nn.RMSNorm, RMSNorm])(width)


class Perceptron(nn.Module):
    """Norm, perceptron, LayerScale, residual."""

    def __init__(self, norm: nn.Module, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gamma = nn.Parameter(1e-5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.down(F.gelu(self.up(self.norm(x)), approximate="tanh"))


@block("sequence", least=1.0)
def perceptron(width: int, r: Random) -> tuple[nn.Module, int]:
    return Perceptron(normalization(width, r), width, r.randint(3, 9)), width


class GatedPerceptron(nn.Module):
    """SwiGLU and its kin: a projection for each, or one that is taken apart."""

    def __init__(self, width: int, hidden: int, spelling: str) -> None:
        super().__init__()
        self.spelling, self.hidden = spelling, hidden
        if spelling == "separate":
            self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        else:
            self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.spelling == "separate":
            return x + self.down(F.silu(self.gate(x)) * self.up(x))
        y = self.up(x)
        if self.spelling == "glu":
            return x + self.down(F.glu(y))
        if self.spelling == "chunk":
            gate, y = y.chunk(2, -1)
        elif self.spelling == "split":
            gate, y = y.split([self.hidden, self.hidden], -1)
        else:
            gate, y = y.unflatten(-1, (2, self.hidden)).unbind(-2)
        return x + self.down(F.gelu(gate) * y)


@block("sequence", least=1.0)
def gated_perceptron(width: int, r: Random) -> tuple[nn.Module, int]:
    return GatedPerceptron(width, r.randint(3, 7), r.choice(["separate", "glu", "chunk", "split", "unflatten"])), width


class Recurrent(nn.Module):
    """A recurrent layer, its last hidden state added to every step."""

    def __init__(self, kind: type[nn.RNNBase], width: int, hidden: int, both_ways: bool) -> None:
        super().__init__()
        self.layer = kind(width, hidden, batch_first=True, bidirectional=both_ways)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)[0]
        return y + y[:, -1:]


@block("sequence", least=1.0)
def recurrent(width: int, r: Random) -> tuple[nn.Module, int]:
    kind, hidden, both_ways = r.choice([nn.LSTM, nn.GRU, nn.RNN]), r.randint(3, 5), r.random() < 0.5
    return Recurrent(kind, width, hidden, both_ways), hidden * (1 + both_ways)


class StateSpace(nn.Module):
    """A selective state space with a scan in Python, as in Mamba."""

    def __init__(self, width: int, inner: int, states: int, rank: int) -> None:
        super().__init__()
        self.inner, self.states, self.rank = inner, states, rank
        self.into = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, 3, groups=inner, padding=2)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, states + 1).float()).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        y, z = self.into(x).chunk(2, dim=-1)
        y = F.silu(self.conv(y.transpose(1, 2))[..., :length]).transpose(1, 2)
        dt, B, C = self.x_proj(y).split([self.rank, self.states, self.states], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        A = torch.exp(dt[..., None] * -torch.exp(self.A_log))
        steps = (dt * y)[..., None] * B[:, :, None, :]
        state = torch.zeros(n, self.inner, self.states, dtype=x.dtype)
        outputs = []
        for i in range(length):
            state = A[:, i] * state + steps[:, i]
            outputs.append((state @ C[:, i, :, None]).squeeze(-1))
        y = torch.stack(outputs, 1) + y * self.D
        return x + self.out(y * F.silu(z))


@block("sequence", least=1.0)
def state_space(width: int, r: Random) -> tuple[nn.Module, int]:
    return StateSpace(width, r.randint(3, 5), r.randint(2, 4), r.randint(2, 3)), width


class Experts(nn.Module):
    """Each token goes to its best experts."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            y = y.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return x + y.view_as(x)


@block("sequence", least=0.85)
def experts(width: int, r: Random) -> tuple[nn.Module, int]:
    return Experts(width, r.randint(3, 5), r.randint(2, 3)), width


class SoftExperts(nn.Module):
    """Every expert sees every token; kernels are stacked, outputs weighted."""

    def __init__(self, width: int, hidden: int, experts: int, spelling: str) -> None:
        super().__init__()
        self.router, self.spelling, self.count = nn.Linear(width, experts), spelling, experts
        self.up = nn.Parameter(torch.randn(experts, width, hidden))
        self.down = nn.Parameter(torch.randn(experts, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).sigmoid()
        if self.spelling == "einsum":
            hidden = torch.einsum("nlc,ech->nleh", x, self.up).relu()
            return x + torch.einsum("nleh,ehc,nle->nlc", hidden, self.down, weights)
        flat = x.reshape(-1, x.shape[-1])
        y = torch.bmm(torch.bmm(flat.expand(self.count, -1, -1), self.up).relu(), self.down)
        return x + (y * weights.reshape(-1, self.count).t()[..., None]).sum(0).view_as(x)


@block("sequence", least=1.0)
def soft_experts(width: int, r: Random) -> tuple[nn.Module, int]:
    return SoftExperts(width, r.randint(2, 4), r.randint(2, 3), r.choice(["einsum", "bmm"])), width


class TokenMixer(nn.Module):
    """A perceptron over the tokens, as in MLP-Mixer: its hidden units are an axis, the tokens are not."""

    def __init__(self, width: int, hidden: int, length: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(length, hidden), nn.Linear(hidden, length)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x).transpose(1, 2)).relu()).transpose(1, 2)


@block("sequence", least=0.6)
def token_mixer(width: int, r: Random) -> tuple[nn.Module, int]:
    return TokenMixer(width, r.randint(3, 6)), width


class Positions(nn.Module):
    """A class token in front, a table of positions, and the class token mixed into the others."""

    def __init__(self, width: int, length: int = 6) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.table = nn.Parameter(torch.randn(1, length + 1, width))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.table
        return y[:, 1:] * y[:, :1].sigmoid()


@block("sequence", least=0.65)
def positions(width: int, r: Random) -> tuple[nn.Module, int]:
    return Positions(width), width


class CausalConvolution(nn.Module):
    """A depthwise convolution over time between two projections, with a gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.conv = nn.Conv1d(hidden, hidden, 3, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).transpose(1, 2)
        y = self.conv(F.pad(y, (2, 0))).transpose(1, 2)
        return x + self.down(y.tanh())


@block("sequence", least=1.0)
def causal_convolution(width: int, r: Random) -> tuple[nn.Module, int]:
    return CausalConvolution(width, r.randint(3, 6)), width


class FourierMixer(nn.Module):
    """Mixes by a Fourier transform, as in FNet: the width is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.fft.fft2(x, dim=(1, 2)).real


@block("sequence", least=0.3, local=False)
def fourier(width: int, r: Random) -> tuple[nn.Module, int]:
    return nn.Sequential(FourierMixer(), Perceptron(nn.LayerNorm(width), width, r.randint(3, 5))), width
