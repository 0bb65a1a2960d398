"""to_layout: the bytes of a quantized tensor in another place; preferred_layout: where its kernels want them."""

from __future__ import annotations

import torch

from microscale.formats import SegmentedFormat
from microscale.kernels import reference
from microscale.kernels.cpu import native
from microscale.kernels.cpu.layout import pack_rows16
from microscale.kernels.dispatch import REFERENCE, Operation, Request, choose
from microscale.layouts import LAYOUTS
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.layouts.rows16 import NAME as ROWS16
from microscale.tensor import QuantizedTensor, join_segments


def to_layout(tensor: QuantizedTensor, name: str) -> QuantizedTensor:
    """Return the same tensor in the layout ``name``; parts that both layouts share are not copied.

    Exactness: bitwise; going there and back gives the same parts, and every backend gives the same bytes. Nothing is
    decoded, so NaN, Inf and -0 pass as any other code.

    Raises:
        LayoutError: there is no such layout, or it has no place for the tensor's format.
    """
    if isinstance(tensor.format, SegmentedFormat):
        return join_segments([to_layout(segment, name) for segment in tensor.segments], tensor.format)
    from_to = (tensor.layout, name)
    if from_to == (ROW_MAJOR, ROWS16) and native.NATIVE is not None and tensor.device.type == "cpu":
        return pack_rows16(tensor)
    return reference.to_layout(tensor, name)


def preferred_layout(tensor: QuantizedTensor, dtype: torch.dtype) -> str:
    """Return the layout in which ``linear`` on inputs of ``dtype`` runs on a compiled backend; row_major if in none.

    The backends say it themselves: one that reads a layout does not refuse a request for it.
    """
    others = [name for name in LAYOUTS if name != ROW_MAJOR]
    for name in others:
        if LAYOUTS[name].refusal(tensor.format, tensor.shape) is not None:
            continue
        request = Request(
            operation=Operation.LINEAR, format=tensor.format, device=tensor.device, dtype=dtype, layout=name
        )
        if choose(request) is not REFERENCE:
            return name
    return ROW_MAJOR
