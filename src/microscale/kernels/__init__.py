"""How numbers are computed: one contract for each operation, several backends, a dispatcher that explains itself."""

from microscale.kernels.dispatch import Operation, Request, why_not
from microscale.kernels.layout import preferred_layout, to_layout
from microscale.kernels.ops import (
    dequantize,
    fake_quantize,
    gather_quantize,
    hadamard,
    hadamard_quantize,
    linear,
    linear_mixed,
    quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)

__all__ = [
    "Operation",
    "Request",
    "dequantize",
    "fake_quantize",
    "gather_quantize",
    "hadamard",
    "hadamard_quantize",
    "linear",
    "linear_mixed",
    "preferred_layout",
    "quantize",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul",
    "silu_mul_quantize",
    "to_layout",
    "why_not",
]
