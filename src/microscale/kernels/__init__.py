"""How numbers are computed: one contract for each operation, several backends, a dispatcher that explains itself."""

from microscale.kernels.dispatch import Operation, Request, why_not
from microscale.kernels.layout import preferred_layout, to_layout
from microscale.kernels.ops import dequantize, fake_quantize, linear, quantize

__all__ = [
    "Operation",
    "Request",
    "dequantize",
    "fake_quantize",
    "linear",
    "preferred_layout",
    "quantize",
    "to_layout",
    "why_not",
]
