"""The reference backend: plain vectorised torch on any device; slow, exact, the definition of every operation."""

from microscale.kernels.backend import Backend, Operation, Request
from microscale.kernels.reference.decoder import (
    CACHE,
    add_rms_norm,
    attend,
    gate,
    largest_index,
    linear_dense,
    linear_group,
    store_heads,
)
from microscale.kernels.reference.fused import (
    gather_quantize,
    hadamard,
    hadamard_quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from microscale.kernels.reference.layout import to_layout
from microscale.kernels.reference.quantize import dequantize, fake_quantize, linear, linear_mixed, quantize
from microscale.layouts import LAYOUTS


def _why_not(request: Request) -> str | None:
    if request.operation in (Operation.STORE_HEADS, Operation.ATTEND):
        is_own = request.layout == CACHE.name
        return None if is_own else f"reads caches in the layout {CACHE.name} only, not {request.layout}"
    unknown = [name for name in (request.layout, request.target) if name is not None and name not in LAYOUTS]
    return f"knows the layouts {', '.join(LAYOUTS)}, not {unknown[0]}" if unknown else None


BACKEND = Backend(
    name="reference",
    title="reference path in torch",
    rank=1000,
    implementations={
        Operation.QUANTIZE: quantize,
        Operation.DEQUANTIZE: dequantize,
        Operation.FAKE_QUANTIZE: fake_quantize,
        Operation.TO_LAYOUT: to_layout,
        Operation.LINEAR: linear,
        Operation.LINEAR_MIXED: linear_mixed,
        Operation.RMS_NORM: rms_norm,
        Operation.SILU_MUL: silu_mul,
        Operation.HADAMARD: hadamard,
        Operation.RMS_NORM_QUANTIZE: rms_norm_quantize,
        Operation.SILU_MUL_QUANTIZE: silu_mul_quantize,
        Operation.GATHER_QUANTIZE: gather_quantize,
        Operation.HADAMARD_QUANTIZE: hadamard_quantize,
        Operation.ADD_RMS_NORM: add_rms_norm,
        Operation.STORE_HEADS: store_heads,
        Operation.ATTEND: attend,
        Operation.GATE: gate,
        Operation.LINEAR_DENSE: linear_dense,
        Operation.LINEAR_GROUP: linear_group,
        Operation.LARGEST_INDEX: largest_index,
    },
    why_not=_why_not,
    cache_layout=CACHE,
)

__all__ = [
    "BACKEND",
    "dequantize",
    "fake_quantize",
    "gather_quantize",
    "hadamard",
    "hadamard_quantize",
    "linear",
    "linear_mixed",
    "quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul",
    "silu_mul_quantize",
    "to_layout",
]
