"""Linear and convolutional layers as matrices: what they read as rows, and their weight as a matrix on these rows.

A linear layer is z = W x + b. A convolution is that too, with x = a patch of its input; a grouped one has a matrix for
each group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import NotApplicable


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or a two-dimensional convolution."""
    return isinstance(module, nn.Linear | nn.Conv2d) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module is the linear layer of transformers, whose weight has the shape (inputs, outputs)."""
    return type(module).__name__ == "Conv1D"


def holders(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules that hold the parameter or buffer of this name as their own: several where they share it."""
    path, _, key = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), key)
    return [
        module
        for module in model.modules()
        if any(own is tensor for own in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    ]


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return a layer's input as (groups, samples and positions, columns of the weight as a matrix).

    Raises:
        NotApplicable: The module is neither linear nor a two-dimensional convolution.
    """
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(_padded(module, x), module.kernel_size, module.dilation, stride=module.stride)
        n, columns, positions = patches.shape
        grouped = patches.view(n, module.groups, columns // module.groups, positions)
        return grouped.permute(1, 0, 3, 2).reshape(module.groups, n * positions, columns // module.groups)
    if is_matrix(module):
        return x.reshape(1, -1, x.shape[-1])
    raise NotApplicable(f"Linear and Conv2d layers can be read as matrices, {type(module).__name__} cannot.")


def output_rows(module: nn.Module, z: Tensor) -> Tensor:
    """Return a layer's output as (groups, samples and positions, rows of the weight as a matrix)."""
    if isinstance(module, nn.Conv2d):
        n, channels = z.shape[:2]
        grouped = z.reshape(n, module.groups, channels // module.groups, -1)
        return grouped.permute(1, 0, 3, 2).reshape(module.groups, -1, channels // module.groups)
    return z.reshape(1, -1, z.shape[-1])


def weight_matrix(module: nn.Module, values: Tensor | None = None) -> Tensor:
    """Return a layer's weight as (groups, outputs of a group, columns), detached.

    Args:
        module: The layer.
        values: Tensor of the weight's shape that stands in for it.
    """
    own: Any = module.weight
    weight: Tensor = (own if values is None else values).detach()
    weight = weight.t() if is_transposed(module) else weight
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def set_weight_matrix(module: nn.Module, values: Tensor) -> None:
    """Give a layer's weight the values of a matrix shaped like `weight_matrix`; mutates it."""
    weight: Any = module.weight
    with torch.no_grad():
        if is_transposed(module):
            weight.copy_(values[0].t())
        else:
            weight.copy_(values.reshape(weight.shape))


def input_dim(module: nn.Module) -> int:
    """Return which dim of a layer's weight its inputs are."""
    return 0 if is_transposed(module) else 1


def columns_per_input(module: nn.Module) -> int:
    """Return how many columns of the weight as a matrix each input channel has: the entries of a kernel."""
    return module.kernel_size[0] * module.kernel_size[1] if isinstance(module, nn.Conv2d) else 1


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode)
