"""Check the content of parts that kernels index with, so that a hostile file cannot make them read elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from microscale.errors import CheckpointError
from microscale.formats import BlockFormat, Format, NaNPolicy, PairFormat, SegmentedFormat, VectorBlock
from microscale.layouts import matrix_shape, unpack_bits
from microscale.layouts.row_major import grid_shape, high_count, scale_dtype
from microscale.layouts.segments import shapes, split_parts


def check_parts(name: str, fmt: Format, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> None:
    """Refuse parts whose content cannot have come from quantization; shapes and dtypes are checked elsewhere.

    Raises:
        CheckpointError: naming the layer and the part.
    """
    rows, cols = matrix_shape(shape)
    if isinstance(fmt, SegmentedFormat):
        pairs = zip(shapes(fmt, shape), split_parts(parts, fmt), strict=True)
        for index, ((part, own_shape), own) in enumerate(pairs):
            check_parts(f"{name} (segment {index})", part, own_shape, own)
        return
    if isinstance(fmt, PairFormat):
        grid = grid_shape(fmt.block, rows, cols)
        num_high = int(unpack_bits(parts["bitmap"], 1, grid[1]).sum())
        if num_high != high_count(fmt, grid[0] * grid[1]):
            raise CheckpointError(f"{name}: the bitmap marks {num_high} wide blocks, which contradicts its format")
        streams = (("low_", fmt.low, grid[0] * grid[1] - num_high), ("high_", fmt.high, num_high))
        for prefix, part, count in streams:
            own = {key.removeprefix(prefix): value for key, value in parts.items() if key.startswith(prefix)}
            if count:
                _check_block_parts(f"{name} ({prefix[:-1]} stream)", part, 1, count * fmt.block.size, own)
    else:
        _check_block_parts(name, fmt, rows, cols, parts)
    if fmt.sparse is not None:
        _check_sparse(name, rows, cols, parts)


def _check_block_parts(name: str, fmt: BlockFormat, rows: int, cols: int, parts: Mapping[str, Tensor]) -> None:
    inverse = parts.get("tensor_inv_scale")
    if inverse is not None and not (bool(torch.isfinite(inverse).all()) and bool((inverse > 0).all())):
        raise CheckpointError(f"{name}: tensor_inv_scale must be finite and positive, got {inverse.tolist()}")
    scale = parts["scale"]
    if scale_dtype(fmt) == torch.uint8:
        nan_code = fmt.scale.nan_code if fmt.nan_policy is NaNPolicy.RAISE else None
        if nan_code is not None and bool((scale == nan_code).any()):
            raise CheckpointError(f"{name}: a scale is NaN, but the format says nan_raise")
    elif bool(torch.isinf(scale).any()) or bool((scale < 0).any()):
        raise CheckpointError(f"{name}: scales must not be infinite or negative")
    elif fmt.nan_policy is NaNPolicy.RAISE and bool(torch.isnan(scale).any()):
        raise CheckpointError(f"{name}: a scale is NaN, but the format says nan_raise")
    if fmt.index_bits and isinstance(fmt.block, VectorBlock):
        index = unpack_bits(parts["index"], fmt.index_bits, grid_shape(fmt.block, rows, cols)[1]).to(torch.int32)
        place = index & ((1 << fmt.place_bits) - 1)
        if int(place.max()) >= fmt.block.size:
            raise CheckpointError(f"{name}: an index of the largest element is {int(place.max())}, past its block")


def _check_sparse(name: str, rows: int, cols: int, parts: Mapping[str, Tensor]) -> None:
    offsets, columns = parts["sparse_offsets"].to(torch.int64), parts["sparse_columns"]
    in_order = bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0 and int(offsets[-1]) == columns.numel()
    if not in_order:
        raise CheckpointError(f"{name}: the row offsets of the sparse table do not ascend from 0 to its length")
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < cols:
        raise CheckpointError(f"{name}: a column of the sparse table is outside 0..{cols - 1}")
    scale = parts.get("sparse_scale")
    if scale is not None and not (bool(torch.isfinite(scale).all()) and bool((scale > 0).all())):
        raise CheckpointError(f"{name}: sparse_scale must be finite and positive, got {scale.tolist()}")
