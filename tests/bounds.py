"""The bound of ``linear``, as its contract in kernels/ops.py derives it."""

from __future__ import annotations

import torch
from torch import Tensor

from microscale.formats import BlockFormat, Format, VectorBlock

EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Unit roundoff of each dtype."""


def linear_bound(
    inputs: Tensor, weight: Tensor, fmt: Format, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """How far a result may lie from float64: inputs [m, cols] as used, weight [rows, cols] dequantized."""
    x, w = inputs.double().abs(), weight.double().abs()
    size = fmt.block.size if isinstance(fmt, BlockFormat) and isinstance(fmt.block, VectorBlock) else 16
    cols = w.shape[1]
    terms = cols + 4 * (-(-cols // min(size, 32))) + 4
    total = x @ w.T + (0 if bias is None else bias.double().abs())
    bound = terms * 2.0**-24 * total + cols * 2.0**-100 * w.max()
    if dtype != torch.float32:
        bound = bound + EPSILON[dtype] * (total + bound)
    return bound


def exact_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product in float64."""
    result = inputs.double() @ weight.double().T
    return result if bias is None else result + bias.double()
