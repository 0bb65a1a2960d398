"""The reference backend: plain vectorised torch on any device; slow, exact, the definition of every operation."""

from microscale.kernels.backend import Backend, Operation, Request, by_operation
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
    implementations=by_operation(
        (quantize, dequantize, fake_quantize, to_layout, linear, linear_mixed, rms_norm, silu_mul, hadamard),
        (rms_norm_quantize, silu_mul_quantize, gather_quantize, hadamard_quantize),
        (add_rms_norm, store_heads, attend, gate, linear_dense, linear_group, largest_index),
    ),
    why_not=_why_not,
    cache_layout=CACHE,
)
