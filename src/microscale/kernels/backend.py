"""What a backend is: one record with all that the rest of the house needs to know of it.

A backend is a folder of :mod:`microscale.kernels` whose package holds ``BACKEND``, a :class:`Backend`. Nothing outside
the folder knows it by name: :mod:`microscale.kernels.dispatch` finds the folders, asks their records, and takes the
first that can run a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch

from microscale.errors import KernelError, shown
from microscale.formats import Format, format_name
from microscale.kernels.operands import CacheLayout
from microscale.layouts import Layout
from microscale.layouts.row_major import NAME as ROW_MAJOR


class Operation(Enum):
    """The operations; :mod:`microscale.kernels.ops` and :mod:`microscale.kernels.decoder_ops` state their contracts."""

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
    ADD_RMS_NORM = "add_rms_norm"
    STORE_HEADS = "store_heads"
    ATTEND = "attend"
    GATE = "gate"
    LINEAR_DENSE = "linear_dense"
    LINEAR_GROUP = "linear_group"
    LARGEST_INDEX = "largest_index"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a backend is asked to do: the facts that decide whether it can (``format``: None where there is none)."""

    operation: Operation
    device: torch.device
    dtype: torch.dtype
    format: Format | None = None
    layout: str = ROW_MAJOR
    activations: Format | None = None
    """``linear``: the format that the inputs are rounded to on the fly."""
    target: str | None = None
    """``to_layout``: the layout that is wanted."""
    records_gradient: bool = False
    """Whether autograd must see the operation."""
    stored: torch.dtype | None = None
    """The float type of the other operand: of a weight that is not quantized, or of a cache's numbers."""
    group_size: int = 1
    """``linear_group``: how many weights share the input."""

    def __str__(self) -> str:
        subject = "" if self.format is None else f" of {format_name(self.format)}"
        target = "" if self.target is None else f" to {self.target}"
        return f"{self.operation.value}{subject} ({self.dtype}, {self.device}, layout {self.layout}{target})"


class StepKind(Enum):
    """What a step of a plan is, for the share of time that each kind takes."""

    NORM = "norms"
    LINEAR = "linears"
    ATTENTION = "attention"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One operation with all its operands, results included: to be run at once, or bound into a plan.

    ``requests`` are the parts of the call, as :func:`microscale.kernels.dispatch.execute` takes them.
    """

    kind: StepKind
    requests: tuple[Request, ...]
    arguments: tuple[Any, ...]

    @property
    def operation(self) -> Operation:
        """The operation."""
        return self.requests[0].operation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanStep:
    """A prepared piece of a plan: ``run()`` does what its calls say, on the same memory every time.

    A step without calls is a function that stands between them, such as a module that keeps a state.
    """

    kinds: tuple[StepKind, ...]
    run: Callable[[], object]
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A named set of implementations with what is to be known of them.

    ``why_not`` returns the reason of a refusal, or None. ``rank`` orders backends: the lowest is asked first, and the
    one that takes everything has the highest. ``layouts`` are the memory layouts that the backend owns.
    ``wanted_layout(format, shape, dtype, device)`` names the layout in which ``linear`` reads a weight of that format
    on inputs of that dtype fastest, None where the backend has no kernel for it. ``unavailable`` says why nothing of
    the backend runs on this machine (None: it runs), ``advice`` what its user should be told on this machine: how to
    get it where it could be had. ``title`` is how a person calls it. ``level`` names what the kernels were built for
    and use now: an instruction-set level or a GPU's architecture. ``describe`` says in a few words how it would run a
    request that it does not refuse.

    ``cache_layout`` is how the backend lays out keys and values. ``bind`` prepares consecutive calls, none of which it
    refuses: one step for each, or one for several (a captured graph); without it the implementations are called.
    """

    name: str
    title: str
    rank: int
    implementations: Mapping[Operation, Callable[..., Any]]
    why_not: Callable[[Request], str | None]
    layouts: tuple[Layout, ...] = ()
    wanted_layout: Callable[[Format, tuple[int, ...], torch.dtype, torch.device], str | None] = lambda *_: None
    unavailable: Callable[[], str | None] = lambda: None
    level: Callable[[], str | None] = lambda: None
    advice: Callable[[], str | None] = lambda: None
    cache_layout: CacheLayout | None = None
    bind: Callable[[Sequence[Call]], Sequence[PlanStep]] | None = None
    describe: Callable[[Request], str | None] = lambda _: None

    def refusal(self, request: Request) -> str | None:
        """Return why this backend cannot run the request, or None where it can."""
        if request.operation not in self.implementations:
            return f"does not implement {request.operation.value}"
        return self.unavailable() or self.why_not(request)


def check_backend(backend: Backend) -> None:
    """Refuse a record that dispatch could not use.

    Raises:
        KernelError: with the field, what was expected and what came.
    """
    given: Any = backend  # the annotations bind nobody
    for field in ("name", "title"):
        word = getattr(given, field)
        if not isinstance(word, str) or not word.strip():
            raise KernelError(f"the {field} of a backend must be a text that is not empty, got {shown(word)}")
    rank = given.rank
    if isinstance(rank, bool) or not isinstance(rank, int | float) or not math.isfinite(rank):
        raise KernelError(f"the rank of backend {backend.name!r} must be a finite number, got {shown(rank)}")
    if not callable(given.why_not):
        raise KernelError(
            f"why_not of backend {backend.name!r} must be a function from a Request to a reason or None,"
            f" got {shown(given.why_not)}"
        )
    found = given.implementations
    expected = f"implementations of backend {backend.name!r} must be a mapping from Operation to functions"
    if not isinstance(found, Mapping):
        raise KernelError(f"{expected}, got {shown(found)}")
    for operation, function in cast("Mapping[object, object]", found).items():
        if not isinstance(operation, Operation) or not callable(function):
            raise KernelError(f"{expected}, got {shown(operation)}: {shown(function)}")


def by_operation(*groups: Sequence[Callable[..., Any]]) -> dict[Operation, Callable[..., Any]]:
    """Return implementations by operation; each function has the name of its operation."""
    return {Operation(function.__name__): function for group in groups for function in group}
