"""Small networks of the standard families, in ordinary PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import UnknownName


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; the shortcut is a projection where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, c_out, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR-style residual network of He et al. (2016), section 4.2, with projection shortcuts.

    Args:
        depth: 6 n + 2 layers with weights: 8, 14, 20 ...
        width: Channels of the first stage; the next two have twice and four times as many.
        channels: Of the input.
        classes: Of the output.
    """

    def __init__(self, depth: int = 20, width: int = 16, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        c_in = width
        for stage in range(3):
            c_out = width * 2**stage
            for i in range(blocks):
                stages.append(BasicBlock(c_in, c_out, stride=2 if stage > 0 and i == 0 else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> logits (n, classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a LayerNorm, each with a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al., 2021) with mean pooling.

    Args:
        size: Height and width of the input.
        patch: Height and width of a patch.
        width: Of the residual stream.
        depth: Number of blocks.
        heads: Per block.
        channels: Of the input.
        classes: Of the output.
    """

    def __init__(
        self,
        size: int = 32,
        patch: int = 8,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(torch.empty(1, (size // patch) ** 2, width))
        self.reset_parameters()
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 4 * width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def reset_parameters(self) -> None:
        """Draw the parameters that no layer holds anew."""
        with torch.no_grad():
            self.positions.copy_(0.02 * torch.randn_like(self.positions))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, size, size) -> logits (n, classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]


_RESNETS = {"resnet8": 8, "resnet8-narrow": 8, "resnet14": 14, "resnet20": 20}


def build_network(name: str, width: int, size: int, channels: int = 1, classes: int = 10) -> nn.Module:
    """Return a new network with random weights.

    Args:
        name: ``resnet8``, ``resnet8-narrow``, ``resnet14``, ``resnet20`` or ``vit``.
        width: Channels of the first stage, or of the residual stream.
        size: Height and width of the input.
        channels: Of the input.
        classes: Of the output.

    Raises:
        UnknownName: No such network.
    """
    if name in _RESNETS:
        return ResNet(_RESNETS[name], width, channels, classes)
    if name == "vit":
        return ViT(size, size // 4, width, channels=channels, classes=classes)
    raise UnknownName("network", name, (*_RESNETS, "vit"))
