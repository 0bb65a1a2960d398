"""The reference backend: plain vectorised torch on any device; slow, exact, the definition of every operation."""

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

__all__ = [
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
