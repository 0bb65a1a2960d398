"""Dense-and-sparse: the largest elements of a tensor kept apart in rows of (column, value)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from microscale.formats import SparseElement, SparseTable
from microscale.formats.codec import decode, encode, encode_scale
from microscale.formats.elements import E4M3, FP16
from microscale.kernels.reference.scales import FLOAT32_MAX, quotient
from microscale.layouts.row_major import sparse_count


def split_sparse(
    matrix: Float[Tensor, "rows cols"], sparse: SparseTable, column_dtype: torch.dtype
) -> tuple[Float[Tensor, "rows cols"], dict[str, Shaped[Tensor, "..."]]]:
    """Return the matrix with its largest elements set to zero, and the parts of the table that holds them.

    Of equal magnitudes the first in reading order are kept. NaN and Inf are never kept (they poison their block);
    if they leave too few elements, zeros fill the table.
    """
    rows, cols = matrix.shape
    flat = matrix.reshape(-1)
    rank = torch.where(torch.isfinite(flat), flat.abs(), -1.0)
    order = torch.sort(rank, descending=True, stable=True).indices[: sparse_count(sparse, flat.numel())]
    places = torch.sort(order).values
    values = torch.where(torch.isfinite(flat[places]), flat[places], 0.0)
    dense = flat.clone()
    dense[places] = torch.where(torch.isfinite(flat[places]), 0.0, flat[places])
    counts = torch.bincount(torch.div(places, cols, rounding_mode="floor"), minlength=rows)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    parts: dict[str, Tensor] = {"sparse_columns": (places % cols).to(column_dtype), "sparse_offsets": offsets}
    if sparse.element is SparseElement.FP8:
        largest = values.abs().amax().reshape(1) if values.numel() else values.new_zeros(1)
        scale = torch.where(largest > 0, quotient(largest, E4M3.max_value), torch.ones_like(largest))
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny, max=FLOAT32_MAX)
        parts["sparse_scale"] = scale
        parts["sparse_values"] = encode(values / scale, E4M3)
    else:
        parts["sparse_values"] = encode_scale(values, FP16)
    return dense.reshape(rows, cols), parts


def add_sparse(
    dense: Float[Tensor, "rows cols"], sparse: SparseTable, parts: dict[str, Shaped[Tensor, "..."]]
) -> Float[Tensor, "rows cols"]:
    """Return the matrix with the table's elements put back in their places; poisoned blocks stay NaN."""
    rows, cols = dense.shape
    counts = parts["sparse_offsets"].diff().to(torch.int64)
    row_idx = torch.repeat_interleave(torch.arange(rows, device=dense.device), counts)
    places = row_idx * cols + parts["sparse_columns"].to(torch.int64)
    if sparse.element is SparseElement.FP8:
        values = decode(parts["sparse_values"], E4M3) * parts["sparse_scale"]
    else:
        values = parts["sparse_values"].to(torch.float32)
    flat = dense.reshape(-1).clone()
    flat[places] = torch.where(torch.isnan(flat[places]), flat[places], values)
    return flat.reshape(rows, cols)
