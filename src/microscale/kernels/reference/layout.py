"""Lay a quantized tensor out anew, in plain torch; see :mod:`microscale.layouts` for the layouts."""

from __future__ import annotations

from microscale.layouts import find_layout
from microscale.tensor import QuantizedTensor


def to_layout(tensor: QuantizedTensor, name: str) -> QuantizedTensor:
    """Return the same tensor in another layout; see :func:`microscale.kernels.to_layout` for the contract."""
    rows = find_layout(tensor.layout).unpack(tensor.parts, tensor.format, tensor.shape)
    parts = find_layout(name).pack(rows, tensor.format, tensor.shape)
    return QuantizedTensor(format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, parts=parts, layout=name)
