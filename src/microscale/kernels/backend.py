"""What a backend is: one record with all that the rest of the house needs to know of it.

A backend is a folder of :mod:`microscale.kernels` whose package holds ``BACKEND``, a :class:`Backend`. Nothing outside
the folder knows it by name: :mod:`microscale.kernels.dispatch` finds the folders, asks their records, and takes the
first that can run a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from microscale.formats import Format, format_name
from microscale.layouts import Layout


class Operation(Enum):
    """The operations whose contracts :mod:`microscale.kernels.ops` states."""

    QUANTIZE = "quantize"
    DEQUANTIZE = "dequantize"
    FAKE_QUANTIZE = "fake_quantize"
    TO_LAYOUT = "to_layout"
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
    target: str | None = None
    """``to_layout``: the layout that is wanted."""
    records_gradient: bool = False
    """Whether autograd must see the operation."""

    def __str__(self) -> str:
        subject = "" if self.format is None else f" of {format_name(self.format)}"
        target = "" if self.target is None else f" to {self.target}"
        return f"{self.operation.value}{subject} ({self.dtype}, {self.device}, layout {self.layout}{target})"


def _no_layout(fmt: Format, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str | None:
    del fmt, shape, dtype, device
    return None


def _nothing() -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A named set of implementations with what is to be known of them.

    ``why_not`` returns the reason of a refusal, or None. ``rank`` orders backends: the lowest is asked first, and the
    one that takes everything has the highest. ``layouts`` are the memory layouts that the backend owns.
    ``wanted_layout(format, shape, dtype, device)`` names the layout in which ``linear`` reads a weight of that format
    on inputs of that dtype fastest, None where the backend has no kernel for it. ``unavailable`` says why nothing of
    the backend runs on this machine (None: it runs), ``advice`` what its user should be told on this machine: how to
    get it where it could be had. ``title`` is how a person calls it. ``level`` names what the kernels were built for
    and use now: an instruction-set level or a GPU's architecture.
    """

    name: str
    title: str
    rank: int
    implementations: Mapping[Operation, Callable[..., Any]]
    why_not: Callable[[Request], str | None]
    layouts: tuple[Layout, ...] = ()
    wanted_layout: Callable[[Format, tuple[int, ...], torch.dtype, torch.device], str | None] = _no_layout
    unavailable: Callable[[], str | None] = _nothing
    level: Callable[[], str | None] = _nothing
    advice: Callable[[], str | None] = _nothing

    def refusal(self, request: Request) -> str | None:
        """Return why this backend cannot run the request, or None where it can."""
        if request.operation not in self.implementations:
            return f"does not implement {request.operation.value}"
        return self.unavailable() or self.why_not(request)
