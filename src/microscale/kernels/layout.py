"""to_layout: the bytes of a quantized tensor in another place; preferred_layout: where its kernels want them."""

from __future__ import annotations

import torch

from microscale.errors import FormatError, LayoutError, check_kind
from microscale.formats import Format, SegmentedFormat, format_name
from microscale.formats.segmented import RECORDS
from microscale.kernels import dispatch
from microscale.kernels.backend import Operation, Request
from microscale.kernels.checks import check_float_dtype, check_quantized
from microscale.kernels.dispatch import execute
from microscale.layouts import find_layout
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.tensor import QuantizedTensor, join_segments


def to_layout(tensor: QuantizedTensor, name: str) -> QuantizedTensor:
    """Return the same tensor in the layout ``name``; parts that both layouts share are not copied.

    Exactness: bitwise; going there and back gives the same parts, and every backend gives the same bytes. Nothing is
    decoded, so NaN, Inf and -0 pass as any other code.

    Raises:
        LayoutError: there is no such layout, or it has no place for the tensor's format.
        ArgumentError: something else than a quantized tensor.
    """
    check_quantized(tensor, "what is laid out")
    target = find_layout(name)
    if tensor.layout == name:
        return tensor
    if isinstance(tensor.format, SegmentedFormat):
        return join_segments([to_layout(segment, name) for segment in tensor.segments], tensor.format)
    reason = target.refusal(tensor.format, tensor.shape)
    if reason is not None:
        raise LayoutError(f"{format_name(tensor.format)} cannot be laid out as {name}: {reason}")
    request = Request(
        operation=Operation.TO_LAYOUT,
        format=tensor.format,
        device=tensor.device,
        dtype=tensor.dtype,
        layout=tensor.layout,
        target=name,
    )
    return execute(request, tensor, name)


def preferred_layout(
    tensor: QuantizedTensor,
    dtype: torch.dtype,
    *,
    activations: Format | None = None,
    device: torch.device | None = None,
    operation: Operation = Operation.LINEAR,
) -> str:
    """Return the layout in which ``linear`` (or ``linear_group``) on inputs of ``dtype`` runs fastest, or row_major.

    The backends say it themselves, the preferred one first; a layout that the format has no place in is passed over.
    ``device`` is where the tensor will be (default: where it is).
    """
    check_quantized(tensor, "the weight")
    check_float_dtype(dtype, "the dtype of the inputs")
    if activations is not None:
        check_kind(activations, RECORDS, "activations", "a format record or None", error=FormatError)
    check_kind(device, (torch.device, type(None)), "the device", "a torch.device or None")
    fmt, shape, device = tensor.format, tensor.shape, device or tensor.device
    for backend in dispatch.BACKENDS:
        name = None if backend.unavailable() else backend.wanted_layout(fmt, shape, dtype, device)
        if name is None or find_layout(name).refusal(fmt, shape) is not None:
            continue
        request = Request(
            operation=operation, format=fmt, device=device, dtype=dtype, layout=name, activations=activations
        )
        if backend.refusal(request) is None:
            return name
    return ROW_MAJOR


def is_at_home(layout: str, fmt: Format, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight may stay in a layout on a device: row_major anywhere, others where their owner runs linear."""
    check_kind(layout, str, "the layout", "the name of a layout")
    check_kind(fmt, RECORDS, "the format", "a format record", error=FormatError)
    check_kind(dtype, torch.dtype, "the dtype", "a dtype of torch")
    check_kind(device, torch.device, "the device", "a torch.device")
    request = Request(operation=Operation.LINEAR, format=fmt, device=device, dtype=dtype, layout=layout)
    owners = [each for each in dispatch.BACKENDS if layout in {owned.name for owned in each.layouts}]
    return layout == ROW_MAJOR or any(owner.refusal(request) is None for owner in owners)
