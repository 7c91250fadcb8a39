"""Random numbers: one seed controls everything, and each purpose has a stream of its own.

PyTorch gives the same numbers to all that is seeded alike: a mask that is drawn by the seed that drew the weights keeps
the largest of them, or those of one sign.
"""

from __future__ import annotations

import hashlib

import torch


def seed_for(purpose: str, seed: int) -> int:
    """Return a seed whose numbers have nothing in common with those of `seed` itself or of other purposes."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:7], "big")


def generator_for(purpose: str, seed: int) -> torch.Generator:
    """Return a generator, on the CPU, for one purpose."""
    return torch.Generator().manual_seed(seed_for(purpose, seed))
