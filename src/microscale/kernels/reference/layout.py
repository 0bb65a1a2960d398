"""Lay a quantized tensor out anew, in plain torch; see :mod:`microscale.layouts` for the layouts."""

from __future__ import annotations

from microscale.errors import LayoutError
from microscale.formats import format_name
from microscale.layouts import find_layout
from microscale.tensor import QuantizedTensor


def to_layout(tensor: QuantizedTensor, name: str) -> QuantizedTensor:
    """Return the same tensor in another layout; see :func:`microscale.kernels.to_layout` for the contract."""
    target = find_layout(name)
    if tensor.layout == name:
        return tensor
    reason = target.refusal(tensor.format, tensor.shape)
    if reason is not None:
        raise LayoutError(f"{format_name(tensor.format)} cannot be laid out as {name}: {reason}")
    rows = find_layout(tensor.layout).unpack(tensor.parts, tensor.format, tensor.shape)
    parts = target.pack(rows, tensor.format, tensor.shape)
    return QuantizedTensor(format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, parts=parts, layout=name)
