"""Packed modules for the tests: one weight of 48 rows and 80 columns in any format, and what goes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from microscale.formats import parse_activation
from microscale.kernels import quantize
from microscale.layouts import find_layout
from microscale.nn.embedding import QuantizedEmbedding
from microscale.nn.linear import QuantizedLinear

ROWS, COLS = 48, 80


def weight(rows: int = ROWS, cols: int = COLS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)


def packed_linear(spec: str, *, bias: bool = True, activations: str | None = None) -> QuantizedLinear:
    return QuantizedLinear.from_tensor(
        quantize(weight(), spec),
        bias=weight(1, ROWS)[0] if bias else None,
        activations=None if activations is None else parse_activation(activations),
    )


def packed_embedding(spec: str) -> QuantizedEmbedding:
    return QuantizedEmbedding.from_tensor(quantize(weight(), spec))


def lay_out(model: nn.Module, layout: str) -> list[str]:
    """Lay out the linear layers that the layout takes, by hand: a later move keeps it; the names of those changed."""
    changed: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, QuantizedLinear) or module.layout == layout:
            continue
        if find_layout(layout).refusal(module.format, module.shape) is None:
            module.set_layout(layout)
            module.inference_dtype = None
            changed.append(name)
    return changed


def inputs(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, 3, COLS, generator=torch.Generator().manual_seed(1)).to(dtype)


INDICES = torch.tensor([[0, 47, 5], [5, 5, 31]])
