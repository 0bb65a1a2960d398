"""The compiled CPU kernels: C++ over AVX2, AVX-512 or portable vectors, called with raw pointers."""

from microscale.kernels.cpu.linear import linear, linear_refusal
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
    "linear",
    "linear_refusal",
    "quantize",
    "quantize_refusal",
]
