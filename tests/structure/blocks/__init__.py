"""Small blocks in the spellings that people use, and networks composed of them: the material of the proofs.

A block maps a width to a module of that input width; it is built from a random generator, which chooses its variant.
One file per form of the data: image (n, c, h, w), sequence (n, l, c), signal (n, c, l), volume (n, c, d, h, w).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from torch import nn

Build = Callable[[int, Random], tuple[nn.Module, int]]


@dataclass(frozen=True)
class Block:
    """A kind of block.

    Attributes:
        name: The builder's name.
        form: Which data it works on.
        build: (input width, generator) -> (module, output width).
        least: The share of its parameters' dims that must be free in a network of its own, whatever the variant.
        local: Whether the block may stand beside others without freezing the width that they share.
    """

    name: str
    form: str
    build: Build
    least: float
    local: bool


BLOCKS: dict[str, Block] = {}


def block(form: str, least: float, local: bool = True) -> Callable[[Build], Build]:
    """Register a builder."""

    def register(build: Build) -> Build:
        BLOCKS[build.__name__] = Block(build.__name__, form, build, least, local)
        return build

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
