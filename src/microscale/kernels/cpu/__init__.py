"""The compiled CPU kernels: C++ over AVX2, AVX-512 or portable vectors, called with raw pointers."""

from microscale.kernels.cpu.fused import (
    gather_quantize,
    hadamard,
    hadamard_quantize,
    rms_norm,
    rms_norm_quantize,
    silu_mul,
    silu_mul_quantize,
)
from microscale.kernels.cpu.linear import linear, linear_mixed, linear_refusal
from microscale.kernels.cpu.quantize import (
    dequantize,
    dequantize_refusal,
    fake_quantize,
    quantize,
    quantize_refusal,
)

__all__ = [
    "dequantize",
    "dequantize_refusal",
    "fake_quantize",
    "gather_quantize",
    "hadamard",
    "hadamard_quantize",
    "linear",
    "linear_mixed",
    "linear_refusal",
    "quantize",
    "quantize_refusal",
    "rms_norm",
    "rms_norm_quantize",
    "silu_mul",
    "silu_mul_quantize",
]
