"""Networks of full size for measurements of speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(n, c_in, h, w) -> (n, 4 width, h / stride, w / stride)."""
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50() -> nn.Module:
    """The ResNet-50 of He et al. (2016): 25.6 million parameters, 4.1 billion MACs at 224x224."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    c_in = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for i in range(blocks):
            layers.append(Bottleneck(c_in, 64 * 2**stage, 2 if stage > 0 and i == 0 else 1))
            c_in = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, 1000))


class TransformerBlock(nn.Module):
    """Pre-norm attention and MLP, as in a ViT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, width) -> (n, tokens, width)."""
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, tokens, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer_stack(depth: int) -> tuple[nn.Module, Tensor]:
    """A ViT-like stack of width 192 (0.44 million parameters a block), and 64 tokens."""
    blocks = [TransformerBlock(192, 3) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(192), nn.Linear(192, 10)).eval(), torch.randn(1, 64, 192)


def residual_stack(depth: int) -> tuple[nn.Module, Tensor]:
    """A ResNet-like stack of bottlenecks with 256 channels (0.07 million parameters a block), and 28x28 positions."""
    stem: list[nn.Module] = [nn.Conv2d(3, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
    blocks = [Bottleneck(256, 64, 1) for _ in range(depth)]
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)]
    return nn.Sequential(*stem, *blocks, *head).eval(), torch.randn(1, 3, 28, 28)
