"""Networks: a stem, blocks of one form, a head."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from tests.structure.blocks import BLOCKS
from torch import Tensor, nn

EXAMPLES = {
    "image": lambda batch: torch.randn(batch, 3, 8, 8, dtype=torch.float64),
    "sequence": lambda batch: torch.randint(0, 11, (batch, 6)),
    "signal": lambda batch: torch.randn(batch, 3, 8, dtype=torch.float64),
    "volume": lambda batch: torch.randn(batch, 3, 4, 4, 4, dtype=torch.float64),
}
CONVOLUTIONS = {"image": nn.Conv2d, "signal": nn.Conv1d, "volume": nn.Conv3d}


class Network(nn.Module):
    """A stem, blocks in a row, and a head; a sequence begins with an embedding, which the head may share."""

    def __init__(self, form: str, width: int, names: Sequence[str], r: Random) -> None:
        super().__init__()
        self.stem = nn.Embedding(11, width) if form == "sequence" else CONVOLUTIONS[form](3, width, 1)
        self.blocks, first = nn.Sequential(), width
        for name in names:
            module, width = BLOCKS[name].build(width, r)
            self.blocks.append(module)
        if form == "sequence":
            self.head = nn.Linear(width, 11, bias=False)
            if width == first and r.random() < 0.5:
                self.head.weight = self.stem.weight
        else:
            self.head = nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(2 * width, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.stem(x)))
        return y


def network(form: str, width: int, names: Sequence[str], seed: int, batch: int = 2) -> tuple[nn.Module, Tensor]:
    """Return a network in float64 and eval mode, and an example batch; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(form, width, names, Random(seed)).double().eval(), EXAMPLES[form](batch)
