"""From codes to numbers: the inverse of :mod:`microscale.kernels.reference.encode`, exact up to one rounding.

value = decode(code) * factor in float32, with the factor of :func:`~microscale.kernels.reference.scales.scale_factor`.
Under a power-of-two scale the product is exact, unless it leaves float32.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from microscale.formats import BlockFormat
from microscale.formats.codec import decode_known, decode_zero_point, has_largest
from microscale.kernels.reference.encode import EncodedBlocks, sub_factor
from microscale.kernels.reference.scales import scale_factor


def decode_blocks(encoded: EncodedBlocks, fmt: BlockFormat) -> Float[Tensor, "grid_rows grid_cols size"]:
    """Return the float32 values of all blocks; a NaN scale makes its whole block NaN."""
    factor = scale_factor(encoded.scale, fmt, encoded.tensor_inv_scale).unsqueeze(-1)
    values = decode_known(encoded.codes, fmt.element)
    if encoded.zero_point is not None:
        return (values - decode_zero_point(encoded.zero_point, fmt).unsqueeze(-1)) * factor
    if encoded.sub_scale is not None:
        assert fmt.sub_scale is not None
        groups = values.unflatten(-1, (-1, fmt.sub_scale.size))
        return (groups * sub_factor(factor, encoded.sub_scale, fmt).unsqueeze(-1)).flatten(-2)
    if fmt.is_extended:
        return _decode_extended(encoded, fmt, values, factor)
    return values * factor


def _decode_extended(
    encoded: EncodedBlocks, fmt: BlockFormat, values: Tensor, factor: Tensor
) -> Float[Tensor, "grid_rows grid_cols size"]:
    assert encoded.max_idx is not None
    max_idx = encoded.max_idx.unsqueeze(-1).to(torch.int64)
    largest = decode_largest(encoded.codes.gather(-1, max_idx), fmt) * factor
    if encoded.delta is not None:
        others = values * (factor * torch.pow(2.0, -encoded.delta.to(torch.float32).unsqueeze(-1)))
    else:
        others = values * factor
    extended = others.scatter(-1, max_idx, largest)
    return torch.where(has_largest(encoded.scale, fmt).unsqueeze(-1), extended, 0.0 if fmt.has_zero_code else others)


def decode_largest(codes: Integer[Tensor, "..."], fmt: BlockFormat) -> Float[Tensor, "..."]:
    """Return what the codes of largest elements stand for, before the factor of their block."""
    values = torch.tensor(fmt.largest_values(), dtype=torch.float32, device=codes.device)
    return values[codes.to(torch.int64)]
