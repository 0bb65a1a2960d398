"""to_layout: the bytes of a quantized tensor in another place, bit for bit the same tensor."""

from __future__ import annotations

from microscale.kernels import reference
from microscale.tensor import QuantizedTensor


def to_layout(tensor: QuantizedTensor, name: str) -> QuantizedTensor:
    """Return the same tensor in the layout ``name``; parts that both layouts share are not copied.

    Exactness: bitwise; going there and back gives the same parts, and every backend gives the same bytes. Nothing is
    decoded, so NaN, Inf and -0 pass as any other code.

    Raises:
        LayoutError: there is no such layout, or it has no place for the tensor's format.
    """
    return reference.to_layout(tensor, name)
