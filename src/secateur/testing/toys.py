"""Small networks of every shape that structure has to understand, and models with closed-form answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.tasks.networks import ResNet, ViT


class TwoLayer(nn.Module):
    """y = a · relu(W x) without biases: gradients and scores have closed forms.

    Args:
        weight: W of shape (hidden, inputs).
        head: a of shape (outputs, hidden).
    """

    def __init__(self, weight: Tensor, head: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False, dtype=head.dtype)
        with torch.no_grad():
            self.hidden.weight.copy_(weight)
            self.head.weight.copy_(head)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) -> (n, outputs)."""
        return self.head(F.relu(self.hidden(x)))  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """Expand, depthwise, squeeze-excite, project: the block of MobileNet."""

    def __init__(self, c_in: int, c_out: int, expand: int, stride: int) -> None:
        super().__init__()
        hidden = c_in * expand
        self.expand = nn.Sequential(nn.Conv2d(c_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.excite = SqueezeExcite(hidden, max(hidden // 4, 2))
        self.project = nn.Sequential(nn.Conv2d(hidden, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h / stride, w / stride)."""
        y: Tensor = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class SqueezeExcite(nn.Module):
    """Channel gates computed from channel means."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> the same."""
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class DenseLayer(nn.Module):
    """Concatenates new channels to its input."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(c_in)
        self.conv = nn.Conv2d(c_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c + growth, h, w)."""
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def resnet20() -> nn.Module:
    """Residual network with projection shortcuts."""
    return ResNet(20, 8, channels=3)


def mobilenet() -> nn.Module:
    """Depthwise convolutions, squeeze-excite, residual streams."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.Hardswish(),
        InvertedResidual(16, 16, 3, 1),
        InvertedResidual(16, 24, 4, 2),
        InvertedResidual(24, 24, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )


class GroupedQueries(nn.Module):
    """Attention in which four query heads share two key and value heads.

    Args:
        copied: Whether keys and values are copied for each query head, or the operation is told of the groups.
    """

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(12, 20), nn.Linear(12, 10), nn.Linear(12, 10), nn.Linear(20, 3)
        self.head_dim, self.shared, self.copied = 5, 2, copied

    def forward(self, x: Tensor) -> Tensor:
        """(n, positions, 12) -> (n, positions, 3)."""
        q, k, v = (f(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.copied:
            b, h, n, d = k.shape
            k, v = (t[:, :, None].expand(b, h, self.shared, n, d).reshape(b, h * self.shared, n, d) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.copied, scale=0.5)
        return self.o(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def densenet() -> nn.Module:
    """Concatenation: one axis is a sum of segments that several layers see."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        DenseLayer(16, 8),
        DenseLayer(24, 8),
        DenseLayer(32, 8),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 20, 1, bias=False),
        nn.AvgPool2d(2),
        DenseLayer(20, 12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def squeeze_excite() -> nn.Module:
    """A plain network with channel gates."""
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1),
        nn.ReLU(),
        SqueezeExcite(48, 8),
        nn.Conv2d(48, 64, 3, 2, 1),
        nn.ReLU(),
        SqueezeExcite(64, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def grouped() -> nn.Module:
    """Grouped convolutions and GroupNorm: 24 channels are 4 x 6 for one and 12 x 2 for the other."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1),
        nn.GroupNorm(4, 24),
        nn.ReLU(),
        nn.Conv2d(24, 36, 3, padding=1, groups=12),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(36, 16, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Module:
    """Linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 10))


def vit() -> nn.Module:
    """Attention, LayerNorm, a residual stream."""
    return ViT(16, 4, width=24, depth=2, heads=3, channels=3)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet20": (resnet20, (3, 16, 16)),
    "mobilenet": (mobilenet, (3, 16, 16)),
    "densenet": (densenet, (3, 12, 12)),
    "squeeze_excite": (squeeze_excite, (3, 12, 12)),
    "grouped": (grouped, (3, 12, 12)),
    "mlp": (mlp, (3, 4, 4)),
    "vit": (vit, (3, 16, 16)),
}
"""Name -> (constructor, shape of one input)."""


def toy(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a toy network with random weights and statistics, in eval mode, and a batch of two inputs."""
    build, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                module.weight.normal_(1, 0.3, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model, torch.randn((2, *shape), generator=generator)


def toy_batches(name: str, n: int = 4, batch_size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return random labeled batches for a toy network."""
    _, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn((batch_size, *shape), generator=generator),
            torch.randint(0, 10, (batch_size,), generator=generator),
        )
        for _ in range(n)
    ]
