"""Handwritten digits: 1,797 real images that scikit-learn carries, so nothing is downloaded.

The 8x8 images (UCI, Alpaydin & Kaynak) are enlarged to 24x24, so that a network has something to compute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from secateur.parts.recovery.fine_tune import FineTune
from secateur.tasks.task import Split, Splits, Task, random_shift

TRAIN, VALIDATION = 900, 297  # the other 600 are the test split; 900 is 30 whole batches


def load() -> Splits:
    """Return 900 training, 297 validation and 600 test images of shape (1, 24, 24), standardized."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    images = (F.interpolate(images, size=(24, 24), mode="bilinear", align_corners=False) - 0.305) / 0.34
    labels = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split([TRAIN, VALIDATION, len(labels) - TRAIN - VALIDATION])
    return Splits(*(Split(images[part], labels[part]) for part in parts))


TASK = Task(
    name="digits",
    version=1,
    title="Handwritten digits (scikit-learn, 24x24)",
    load=load,
    digest="aad86d75f68cbe8d",
    size=24,
    networks={"resnet8": 32, "resnet8-narrow": 16, "resnet20": 16, "vit": 64},
    default_network="resnet8",
    training={
        "default": FineTune(epochs=20, lr=0.05, weight_decay=5e-4, warmup=0.05),
        "vit": FineTune(epochs=150, lr=1e-3, weight_decay=0.05, warmup=0.1, optimizer="adamw"),
    },
    augment=random_shift(2),
    batch_size=30,
)
