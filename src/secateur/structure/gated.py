"""Convolutions that compute only the channels that matter for the input at hand, from only those that are not zero.

Gao, Zhao, Dudziak, Mullins, Xu: Dynamic Channel Pruning: Feature Boosting and Suppression, ICLR 2019. The place of a
convolution and of the batch normalization behind it is taken by one module, whose output is

    y = wta_k(g) (norm(conv(x)) + beta)        g = relu(Phi mean|x| + rho)

g: a saliency for each output channel, predicted from the mean size of each input channel. wta_k keeps the k largest of
each sample and sets the others to zero (winner takes all). The gate has taken the place of the normalization's scale.

On one sample, in eval mode, the channels that lose are not computed, and input channels that are zero are not read. A
channel that is zero says so itself, so nothing has to be known about where it comes from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

SMALLEST_SCALE = 0.1
"""Of a normalization, as the first gate of its channel. Smaller ones keep a fixed factor: shift / scale may be huge."""


class Saliency(nn.Linear):
    """g = relu(Phi s + rho): how much each output channel will matter; the untrained one says 1 of each."""

    def reset_parameters(self) -> None:
        """Set Phi to 0 and rho to 1."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, sizes: Tensor) -> Tensor:
        """(n, input channels) -> (n, output channels), not negative; in full precision, so that ranks are stable."""
        with torch.autocast(sizes.device.type, enabled=False):
            return F.relu(F.linear(sizes.to(self.weight.dtype), self.weight, self.bias))


class GatedConv2d(nn.Module):
    """A convolution and its batch normalization, with a gate for each output channel that the input decides about.

    With all channels in use it computes at first what the two have computed: the gates are the size of the
    normalization's scales, whose signs go into the kernels.

    Args:
        convolution: Without groups. It becomes a part of this module; kernels change their sign where the scale had -1.
        norm: With scale, shift and running statistics. It becomes a part of this module; its scale is fixed from now
            on, at 1 (or less, where it was very small), its shift is divided by the gate.

    Attributes:
        winners: How many channels are computed for each sample.
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        weight = convolution.weight
        self.convolution, self.norm = convolution, norm
        self.saliency = Saliency(
            convolution.in_channels, convolution.out_channels, device=weight.device, dtype=weight.dtype
        )
        self.winners = convolution.out_channels
        self._take_over_scale()

    @torch.no_grad()
    def _take_over_scale(self) -> None:
        sign = torch.where(self.norm.weight < 0, -1.0, 1.0).to(self.norm.weight)
        scale = self.norm.weight.abs()
        first = scale.clamp_min(SMALLEST_SCALE)
        self.convolution.weight.mul_(sign.view(-1, 1, 1, 1))
        if self.convolution.bias is not None:
            self.convolution.bias.mul_(sign)
        assert self.norm.running_mean is not None
        self.norm.running_mean.mul_(sign)
        self.norm.weight.copy_(scale / first).requires_grad_(False)
        self.norm.bias.div_(first)
        self.saliency.bias.copy_(first)

    def forward(self, x: Tensor) -> Tensor:
        """(n, input channels, h, w) -> (n, output channels, h', w'); the channels that lose are zero."""
        sizes = x.abs().mean((2, 3))
        gates = self.gates(sizes)
        if self._may_skip(x):
            return self._computed_in_part(x, sizes[0], gates[0])
        computed: Tensor = self.norm(self.convolution(x))
        return gates[:, :, None, None] * computed

    def gates(self, sizes: Tensor) -> Tensor:
        """Return the saliencies of the winners of each sample, 0 for all others; among equals the first win.

        Args:
            sizes: Mean size of each input channel, (n, input channels).
        """
        saliency: Tensor = self.saliency(sizes)
        return saliency if self.winners == saliency.shape[1] else saliency * largest(saliency, self.winners)

    def _may_skip(self, x: Tensor) -> bool:
        """Return whether shapes may depend on values: not where operations are traced, compiled or counted."""
        listened = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        return not self.training and len(x) == 1 and not x.is_meta and not listened

    def _computed_in_part(self, x: Tensor, sizes: Tensor, gates: Tensor) -> Tensor:
        """Return the same for one sample, from the weights between the channels that are not zero alone."""
        read, computed = _nonzero(sizes), _nonzero(gates)
        convolution, norm = self.convolution, self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        scale = gates * norm.weight * (norm.running_var + norm.eps).rsqrt()
        mean = norm.running_mean if convolution.bias is None else norm.running_mean - convolution.bias
        shift = gates * norm.bias - scale * mean
        weight = _picked(_picked(convolution.weight, 0, computed), 1, read)
        part = convolution._conv_forward(_picked(x, 1, read), weight, None)
        scale, shift = (_picked(values, 0, computed).view(-1, 1, 1) for values in (scale, shift))
        part = torch.addcmul(shift, part.to(scale.dtype), scale)
        if len(computed) == convolution.out_channels:
            return part
        whole = part.new_zeros(1, convolution.out_channels, *part.shape[2:])
        return whole.index_copy_(1, computed, part)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows."""
        return f"winners={self.winners}"


def largest(values: Tensor, k: int) -> Tensor:
    """Return True at the k largest entries of each row, exactly k of them: among equals the first count."""
    values = values.detach()
    limit = values.topk(k, 1).values[:, -1:]
    above, equal = values > limit, values == limit
    return above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))


def _nonzero(values: Tensor) -> Tensor:
    """Return where a vector is not zero; the first place if it is nowhere: a convolution needs a channel."""
    found = values.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


def _picked(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    return tensor if len(index) == tensor.shape[dim] else tensor.index_select(dim, index)


def gates_of(model: nn.Module) -> dict[str, GatedConv2d]:
    """Return the gated convolutions of a model by their paths."""
    return {path: module for path, module in model.named_modules() if isinstance(module, GatedConv2d)}
