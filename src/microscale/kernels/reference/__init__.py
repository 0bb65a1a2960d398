"""The reference backend: plain vectorised torch on any device; slow, exact, the definition of every operation."""

from microscale.kernels.reference.layout import to_layout
from microscale.kernels.reference.quantize import dequantize, fake_quantize, linear, quantize

__all__ = ["dequantize", "fake_quantize", "linear", "quantize", "to_layout"]
