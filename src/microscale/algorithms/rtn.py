"""Round-to-nearest: every block on its own, no calibration. The baseline of every other method.

Source: OCP MX v1.0 section 6.3 (the conversion that the specification asks for).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from microscale.formats import Format
from microscale.kernels import quantize
from microscale.tensor import QuantizedTensor


def rtn(weight: Float[Tensor, "rows cols"], fmt: Format, *, name: str = "the weight") -> QuantizedTensor:
    """Quantize a weight with its format's own scale rule and rounding; ``name`` appears in errors.

    Raises:
        NonFiniteError, DtypeError, ShapeError: see :func:`microscale.kernels.ops.quantize`.
    """
    return quantize(weight, fmt, name=name)
