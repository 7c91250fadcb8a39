"""Networks of torchvision that code keeps from shrinking in ways of its own."""

from __future__ import annotations

import pytest
import torch
from benchmarks.coverage.zoo import allow_torchvision

import secateur as sc

allow_torchvision()
models = pytest.importorskip("torchvision.models", reason="needs torchvision: pip install torchvision")


def test_swin_loses_whole_heads_with_its_width():
    """Its scale is computed from the width: ``(C // num_heads) ** -0.5``."""
    torch.manual_seed(0)
    options = {"patch_size": [2, 2], "embed_dim": 12, "depths": [1, 2], "num_heads": [3, 6], "window_size": [2, 2]}
    model = models.SwinTransformer(**options, num_classes=5).eval()
    x = torch.randn(2, 3, 16, 16)
    pruned = sc.prune(model, x, granularity="channel", budget=sc.Budget(macs=0.3))
    assert pruned.proofs[-1].ok and pruned.after.macs <= 0.3 * pruned.before.macs
    for stage, before in ((1, 3), (3, 6)):
        for block in pruned.model.features[stage]:
            heads = block.attn.num_heads
            assert heads < before and block.attn.proj.out_features == 4 * heads
