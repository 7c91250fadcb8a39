"""PyTorch's attention layer, with heads and head dims that can be cut.

`torch.nn.MultiheadAttention` insists on heads x head_dim = embed_dim: without a head it does not run, so traced as it
is, all of its inner widths would be frozen or tied to the embedding. It is the one core class that cannot express what
secateur finds in it, and therefore the one class that secateur replaces. Every other layer stays what it is.

While a model is traced, its attention layers run as the class below: the same parameters under the same names, the same
results. A cut network keeps PyTorch's class wherever the new widths are possible in it, and has ours elsewhere. Which
of the two follows from the widths alone, so a plan does not have to say it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.structure.inputs import modules_of


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose heads, query/key widths and value widths are independent of the embedding.

    It takes and returns what the original does, and its state dict has the same names. It divides by the root of the
    head width that the network was trained with, however many of those remain.

    Attributes:
        scale: What products of queries and keys are multiplied by.
    """

    scale: float

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, so that the layers around it leave their fused path alone: that computes heads from the embedding."""
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended values, shaped like the query, and the attention weights or None.

        Raises:
            RuntimeError: `is_causal` without a mask.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask, too.")
        batched = query.dim() == 3
        q, k, v = (self._batch_first(x, batched) for x in self._project(query, key, value))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        q, k = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k))
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if is_causal and key_padding_mask is None and not need_weights:
            attn_mask = None  # a hint that the kernel below can use
        else:
            is_causal = False
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return query, key and value of all heads side by side."""
        inner = self.num_heads * self.head_dim
        if self.in_proj_weight is not None and query is key and key is value:
            joint = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            return tuple(joint.split([inner, inner, joint.shape[-1] - 2 * inner], -1))
        biases: tuple[Tensor | None, ...] = (None, None, None)
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.split([inner, inner, self.in_proj_bias.shape[0] - 2 * inner])
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split([inner, inner, self.in_proj_weight.shape[0] - 2 * inner])
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        """Return a projection as (batch, length, all heads), whatever the layout of the inputs."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return keys or values with the learned one and the zero that some layers add."""
        if bias is not None:
            x = torch.cat([x, bias.expand(x.shape[0], -1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _mask(self, attention: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        """Return both masks as one that is added to scores of shape (batch, heads, length, keys), or None."""
        total: Tensor | None = None
        if attention is not None:
            total = self._additive(attention, query)
            if total.dim() == 3:
                total = total.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = self._additive(padding if padding.dim() == 2 else padding.unsqueeze(0), query)[:, None, None, :]
            total = padding if total is None else total + padding
        return total

    def _additive(self, mask: Tensor, query: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, float("-inf"))
        added = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(mask, (0, added)) if added else mask


def open_attention(model: nn.Module) -> None:
    """Let every attention layer of PyTorch's run as ours; mutates `model`."""
    for _, module in modules_of(model):
        if type(module) is nn.MultiheadAttention:
            scale = module.head_dim**-0.5
            module.__class__ = MultiheadAttention
            vars(module)["scale"] = scale


def close_attention(model: nn.Module) -> None:
    """Give every attention layer back to PyTorch's class if that can express its widths; mutates `model`."""
    for _, module in modules_of(model):
        if type(module) is MultiheadAttention and _is_ordinary(module):
            _close(module)
        if isinstance(module, nn.TransformerEncoder) and not all(map(_is_fused, module.layers)):
            module.use_nested_tensor = False  # only the fused path of a layer takes nested tensors


@contextmanager
def opened_attention(model: nn.Module) -> Iterator[None]:
    """Let PyTorch's attention layers run as ours while the block runs."""
    modules = [module for _, module in modules_of(model) if type(module) is nn.MultiheadAttention]
    try:
        open_attention(model)
        yield
    finally:
        for module in modules:
            _close(module)


def _close(module: nn.Module) -> None:
    module.__class__ = nn.MultiheadAttention
    vars(module).pop("scale", None)


def _is_ordinary(module: MultiheadAttention) -> bool:
    width = module.num_heads * module.head_dim
    inputs = [module.in_proj_weight, module.q_proj_weight]
    widths = {w.shape[1] for w in inputs if w is not None} | set(module.out_proj.weight.shape)
    rows = 3 * width if module.in_proj_weight is not None else width
    value = module.in_proj_weight if module.in_proj_weight is not None else module.v_proj_weight
    return widths == {width} and value.shape[0] == rows and module.scale == module.head_dim**-0.5


def _is_fused(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    return type(attention) is nn.MultiheadAttention and attention.num_heads % 2 == 0
