"""Choose the backend of an operation, and say why not the others.

A backend is a name, the operations it implements, and ``why_not``, which refuses a request in words. The first
backend of :data:`BACKENDS` without a refusal is taken; the reference backend stands last and takes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from microscale.errors import KernelError
from microscale.formats import Format, format_name
from microscale.kernels import cpu, reference
from microscale.kernels.cpu import native
from microscale.layouts import LAYOUTS
from microscale.layouts.row_major import NAME as ROW_MAJOR


class Operation(Enum):
    """The operations whose contracts :mod:`microscale.kernels.ops` states."""

    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    FAKE_QUANTIZE = "fake_quantize"
    LINEAR = "linear"
    LINEAR_MIXED = "linear_mixed"
    RMS_NORM = "rms_norm"
    SILU_MUL = "silu_mul"
    HADAMARD = "hadamard"
    RMS_NORM_QUANTIZE = "rms_norm_quantize"
    SILU_MUL_QUANTIZE = "silu_mul_quantize"
    GATHER_QUANTIZE = "gather_quantize"
    HADAMARD_QUANTIZE = "hadamard_quantize"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a backend is asked to do: the facts that decide whether it can (``format``: None where there is none)."""

    operation: Operation
    format: Format | None
    device: torch.device
    dtype: torch.dtype
    layout: str
    activations: Format | None = None
    """``linear``: the format that the inputs are rounded to on the fly."""
    records_gradient: bool = False
    """Whether autograd must see the operation."""

    def __str__(self) -> str:
        subject = "" if self.format is None else f" of {format_name(self.format)}"
        return f"{self.operation.value}{subject} ({self.dtype}, {self.device}, layout {self.layout})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A named set of implementations; ``why_not`` returns the reason of a refusal, or None."""

    name: str
    implementations: Mapping[Operation, Callable[..., Any]]
    why_not: Callable[[Request], str | None]

    def refusal(self, request: Request) -> str | None:
        """Return why this backend cannot run the request, or None where it can."""
        if request.operation not in self.implementations:
            return f"does not implement {request.operation.value}"
        return self.why_not(request)


def _reference_refusal(request: Request) -> str | None:
    if request.layout not in LAYOUTS:
        return f"knows the layouts {', '.join(LAYOUTS)}, not {request.layout}"
    return None


CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cpu_refusal(request: Request) -> str | None:
    if native.NATIVE is None:
        return native.UNAVAILABLE
    if request.device.type != "cpu":
        return f"runs on the CPU only, not on {request.device}"
    if request.dtype not in CPU_DTYPES:
        return f"takes float32, bfloat16 and float16 only, not {request.dtype}"
    if request.operation in (Operation.LINEAR, Operation.LINEAR_MIXED):
        if request.records_gradient:
            return "does not record gradients"
        return cpu.linear_refusal(request.layout, request.format, request.activations)
    if request.layout != ROW_MAJOR:
        return f"reads the layout row_major only, not {request.layout}"
    if request.format is None:
        return None
    if request.operation is Operation.DEQUANTIZE:
        return cpu.dequantize_refusal(request.format)
    return cpu.quantize_refusal(request.format)


CPU = Backend(
    name="cpu",
    implementations={
        Operation.QUANTIZE: cpu.quantize,
        Operation.DEQUANTIZE: cpu.dequantize,
        Operation.FAKE_QUANTIZE: cpu.fake_quantize,
        Operation.LINEAR: cpu.linear,
        Operation.LINEAR_MIXED: cpu.linear_mixed,
        Operation.RMS_NORM: cpu.rms_norm,
        Operation.SILU_MUL: cpu.silu_mul,
        Operation.HADAMARD: cpu.hadamard,
        Operation.RMS_NORM_QUANTIZE: cpu.rms_norm_quantize,
        Operation.SILU_MUL_QUANTIZE: cpu.silu_mul_quantize,
        Operation.GATHER_QUANTIZE: cpu.gather_quantize,
        Operation.HADAMARD_QUANTIZE: cpu.hadamard_quantize,
    },
    why_not=_cpu_refusal,
)

REFERENCE = Backend(
    name="reference",
    implementations={
        Operation.QUANTIZE: reference.quantize,
        Operation.DEQUANTIZE: reference.dequantize,
        Operation.FAKE_QUANTIZE: reference.fake_quantize,
        Operation.LINEAR: reference.linear,
        Operation.LINEAR_MIXED: reference.linear_mixed,
        Operation.RMS_NORM: reference.rms_norm,
        Operation.SILU_MUL: reference.silu_mul,
        Operation.HADAMARD: reference.hadamard,
        Operation.RMS_NORM_QUANTIZE: reference.rms_norm_quantize,
        Operation.SILU_MUL_QUANTIZE: reference.silu_mul_quantize,
        Operation.GATHER_QUANTIZE: reference.gather_quantize,
        Operation.HADAMARD_QUANTIZE: reference.hadamard_quantize,
    },
    why_not=_reference_refusal,
)

BACKENDS: list[Backend] = [CPU, REFERENCE]
"""All backends, the preferred one first."""


def why_not(request: Request) -> dict[str, str | None]:
    """Return every backend's reason for refusing the request (None: it can run it)."""
    return {backend.name: backend.refusal(request) for backend in BACKENDS}


def choose_for_all(requests: Sequence[Request]) -> Backend:
    """Return the first backend that can run every one of the requests of one call.

    Raises:
        KernelError: none can; as :func:`choose` for the first request that stands in the way.
    """
    for backend in BACKENDS:
        if all(backend.refusal(request) is None for request in requests):
            return backend
    return next(choose(request) for request in requests if BACKENDS[-1].refusal(request) is not None)


def choose(request: Request) -> Backend:
    """Return the first backend that can run the request.

    Raises:
        KernelError: none can; every backend is listed with its reason.
    """
    for backend in BACKENDS:
        if backend.refusal(request) is None:
            return backend
    reasons = "\n".join(f"  {name}: {reason}" for name, reason in why_not(request).items())
    raise KernelError(f"no backend can run {request}:\n{reasons}\nchoose another format, layout or device")
