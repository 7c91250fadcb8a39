"""Operations that PyTorch's exporter does not know, in terms of ONNX operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from secateur.optional import optional_import

GROUPED_PRODUCTS = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")
"""Products of rows with the matrix of their group: how mixtures of experts compute."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a translation for each of these operations that is registered with PyTorch here."""
    found = {}
    for name in GROUPED_PRODUCTS:
        namespace, _, operation = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            found[packet.default] = grouped_product
    return found


def grouped_product(rows: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Return each row times the matrix of its group: (rows, in), (groups, in, out), (groups,) -> (rows, out).

    Rows are sorted by group, and `offs` says where each group ends; rows beyond the last group give zeros. ONNX has no
    such operation, so every group sees all rows, the others' as zeros: it costs as much as all experts together.
    """
    op = optional_import("onnxscript", "onnx").opset18
    zero, one = (op.Constant(value_ints=[i]) for i in (0, 1))
    number = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(rows, start=0, end=1)), op.Constant(value_int=1))
    ends = op.Cast(offs, to=7)
    starts = op.Concat(zero, op.Slice(ends, zero, op.Constant(value_ints=[-1])), axis=0)
    after = op.GreaterOrEqual(op.Unsqueeze(number, zero), op.Unsqueeze(starts, one))
    before = op.Less(op.Unsqueeze(number, zero), op.Unsqueeze(ends, one))
    own = op.CastLike(op.Unsqueeze(op.And(after, before), op.Constant(value_ints=[2])), rows)  # (groups, rows, 1)
    products = op.MatMul(op.Mul(op.Unsqueeze(rows, zero), own), weight)
    return op.ReduceSum(products, zero, keepdims=0)
