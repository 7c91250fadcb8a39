"""Fine-tuning: ordinary training of the pruned network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.core.slots import Recovery


class FineTune(Recovery):
    """Training on the task's loss.

    Attributes:
        epochs: Passes over the training data, all pruning moments together.
        compute: What `epochs` are counted in. ``epochs``: passes of the pruned network. ``dense epochs``: the
            passes that cost as many MACs as so many of the dense network, which are more. With fresh weights these
            two are the Scratch-E and Scratch-B of Liu et al. (arXiv 1810.05270).
        optimizer: SGD has Nesterov momentum 0.9.
        lr: Largest learning rate.
        weight_decay: Decay of all weights (decoupled for AdamW).
        lr_schedule: ``cosine`` falls to zero, ``constant`` stays.
        warmup: Fraction of the steps in which the learning rate rises linearly.
    """

    name = "fine-tune"
    epochs: float = Field(5.0, gt=0)
    compute: Literal["epochs", "dense epochs"] = "epochs"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.02, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, lt=1)
