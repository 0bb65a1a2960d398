"""to_layout: the bytes of a quantized tensor in another place; preferred_layout: where its kernels want them.

why_not_linear: what stands against a backend, whatever layout the weight lies in.
"""

from __future__ import annotations

import dataclasses

import torch

from microscale.errors import FormatError, LayoutError, check_kind
from microscale.formats import Format, SegmentedFormat, format_name
from microscale.formats.segmented import RECORDS
from microscale.kernels import dispatch
from microscale.kernels.backend import Backend, Operation, Request
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
    request = Request(operation=operation, format=fmt, device=device, dtype=dtype, activations=activations)
    for backend in dispatch.BACKENDS:
        name = _wanted_layout(backend, request, shape)
        if name is not None and _refusal_in(name, backend, request, shape) is None:
            return name
    return ROW_MAJOR


def why_not_linear(request: Request, shape: tuple[int, ...]) -> dict[str, str | None]:
    """Return every backend's reason for refusing ``linear`` on a weight of a shape (None: it can run it).

    It is the reason in the layout that the backend wants for the weight: that the weight does not lie so is often only
    a consequence of it. Where there is no other reason, it is the weight's layout.
    """
    check_kind(request, Request, "a request", "a Request record")
    reasons = dispatch.why_not(request)
    for backend in dispatch.BACKENDS:
        name = None if reasons[backend.name] is None else _wanted_layout(backend, request, shape)
        if name is not None:
            reasons[backend.name] = _refusal_in(name, backend, request, shape) or reasons[backend.name]
    return reasons


def _wanted_layout(backend: Backend, request: Request, shape: tuple[int, ...]) -> str | None:
    assert request.format is not None
    if backend.unavailable():
        return None
    return backend.wanted_layout(request.format, shape, request.dtype, request.device)


def _refusal_in(layout: str, backend: Backend, request: Request, shape: tuple[int, ...]) -> str | None:
    """Return why a weight cannot lie in a layout, or why the backend does not run ``linear`` on it there."""
    assert request.format is not None
    reason = find_layout(layout).refusal(request.format, shape)
    if reason is not None:
        return f"{format_name(request.format)} cannot be laid out as {layout}: {reason}"
    return backend.refusal(dataclasses.replace(request, layout=layout))


def is_at_home(layout: str, fmt: Format, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight may stay in a layout on a device: row_major anywhere, others where their owner runs linear."""
    check_kind(layout, str, "the layout", "the name of a layout")
    check_kind(fmt, RECORDS, "the format", "a format record", error=FormatError)
    check_kind(dtype, torch.dtype, "the dtype", "a dtype of torch")
    check_kind(device, torch.device, "the device", "a torch.device")
    request = Request(operation=Operation.LINEAR, format=fmt, device=device, dtype=dtype, layout=layout)
    owners = [each for each in dispatch.BACKENDS if layout in {owned.name for owned in each.layouts}]
    return layout == ROW_MAJOR or any(owner.refusal(request) is None for owner in owners)
