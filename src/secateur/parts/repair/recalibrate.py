"""Recalibration: the running statistics of batch normalization, estimated anew after a cut."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.core.batches import split_batch
from secateur.core.context import Context
from secateur.core.slots import Repair
from secateur.errors import NotApplicable


class Recalibrate(Repair):
    """The running means and variances become the exact averages over the batches of the data.

    Upstream of a normalization something was cut, so its input is distributed otherwise than when the statistics were
    gathered. One pass over the data, in which the normalizations alone are in training mode.
    """

    name = "recalibrate"

    def after_cut(self, context: Context) -> None:
        """Estimate the statistics of the cut network; mutates them.

        Raises:
            NotApplicable: No batch normalization keeps statistics.
            DataNeeded: There are no data.
        """
        norms = [m for m in context.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        if not norms:
            raise NotApplicable(
                f"Recalibration estimates the statistics of batch normalization, and {type(context.model).__name__} "
                "has none. Choose another repair."
            )
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's word for the average over all batches
        try:
            for batch in context.batches():
                args, kwargs, _ = split_batch(batch)
                with context.undisturbed(), torch.no_grad():
                    for norm in norms:
                        norm.training = True
                    context.model(*args, **kwargs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        for norm in norms:
            statistics = {"mean": norm.running_mean, "variance": norm.running_var}
            context.mean_over_processes({k: v for k, v in statistics.items() if v is not None}, 1)
