"""The layout ``row_major``: what every part of a quantized tensor looks like in memory and in our files.

A tensor of shape [..., cols] is stored as ``rows`` x ``cols`` with ``rows`` the product of the leading axes.
``part_specs`` names the parts of a format with shape and dtype, so that a reader can check a file and a module
can be built before its weights are read.

=================== ================================== =====================================================
part                shape                              content
=================== ================================== =====================================================
codes               [rows, bytes]                      element codes, dense bits, padded to whole blocks
scale               [row blocks, column blocks]        uint8 codes, or float16 / bfloat16 / float32
tensor_inv_scale    [1]                                float32; a block's scale is decode(scale) / it
sub_scale           [rows, bytes]                      sub-group codes, dense bits
zero_point          [rows, bytes] or [rows, blocks]    integers and fp8 as dense bits, fp16 as float16
index               [rows, bytes]                      largest element's place (and exponent difference), dense bits
sparse_values       [count]                            uint8 (E4M3) or float16; the format's share of the tensor
sparse_columns      [count]                            int16 or int32, ascending inside a row
sparse_offsets      [rows + 1]                         int32; row r owns the values from offset r to r + 1
sparse_scale        [1]                                float32, only for fp8
bitmap              [rows, bytes]                      pair: bit 1 marks a block of the wide format
low_*, high_*       parts of the two streams           pair: one row with all blocks of a format, in reading order
s<i>_*              parts of the i-th segment          segments: as those of a tensor of its columns alone
=================== ================================== =====================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.errors import ShapeError
from microscale.formats import (
    Block,
    BlockFormat,
    ChannelBlock,
    Format,
    PairFormat,
    SegmentedFormat,
    SparseElement,
    SparseTable,
    TensorBlock,
    TileBlock,
    VectorBlock,
    ZeroPoint,
)
from microscale.formats.block import sparse_column_bits
from microscale.layouts import segments
from microscale.layouts.bits import row_bytes

NAME = "row_major"


@dataclass(frozen=True, slots=True)
class PartSpec:
    """Dtype and shape of one stored part."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def grid_shape(block: Block, rows: int, cols: int) -> tuple[int, int]:
    """Return how many blocks stand under each other and side by side."""
    match block:
        case VectorBlock(size=size):
            return rows, -(-cols // size)
        case TileBlock(rows=tile_rows, cols=tile_cols):
            return -(-rows // tile_rows), -(-cols // tile_cols)
        case ChannelBlock():
            return rows, 1
        case TensorBlock():
            return 1, 1


def padded_cols(block: Block, cols: int) -> int:
    """Return the width after padding the last block with zeros."""
    match block:
        case VectorBlock(size=size):
            return -(-cols // size) * size
        case TileBlock(cols=tile_cols):
            return -(-cols // tile_cols) * tile_cols
        case ChannelBlock() | TensorBlock():
            return cols


def scale_dtype(fmt: BlockFormat) -> torch.dtype:
    """Return the dtype in which scales are stored."""
    by_name = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    return torch.uint8 if fmt.scale.bits <= 8 else by_name[fmt.scale.name]


def sparse_count(sparse: SparseTable, numel: int) -> int:
    """Return how many elements a sparse table keeps: percent of the tensor, rounded half to even."""
    return min(numel, round(sparse.percent / 100 * numel))


def high_count(fmt: PairFormat, num_blocks: int) -> int:
    """Return how many blocks of a pair are wide, rounded half to even."""
    return round(fmt.high_percent / 100 * num_blocks)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (rows, cols) of a tensor: the last axis is cols, all others are rows.

    Raises:
        ShapeError: a tensor without axes.
    """
    if not shape:
        raise ShapeError("a tensor with at least one axis is needed, got a scalar; reshape it to [1]")
    return math.prod(shape[:-1]), shape[-1]


def part_specs(fmt: Format, shape: tuple[int, ...]) -> dict[str, PartSpec]:
    """Return every part that a quantized tensor of this format and shape has, in file order.

    Raises:
        ShapeError: a scalar, or a width that is not that of the format's segments.
    """
    rows, cols = matrix_shape(shape)
    if isinstance(fmt, SegmentedFormat):
        return segments.name_parts([part_specs(part, own) for part, own in segments.shapes(fmt, shape)])
    if isinstance(fmt, PairFormat):
        num_blocks = math.prod(grid_shape(fmt.block, rows, cols))
        specs = _pair_specs(fmt, rows, cols, high_count(fmt, num_blocks))
    else:
        specs = _block_specs(fmt, rows, cols)
    if fmt.sparse is not None:
        specs.update(_sparse_specs(fmt.sparse, rows, cols, sparse_count(fmt.sparse, rows * cols)))
    return specs


def own_lengths(fmt: Format, shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> dict[str, PartSpec]:
    """Return the specs of a sparse table and of the streams of a pair by the lengths that they have in ``parts``.

    A tensor from ``quantize`` or a file has the share that its format names; a piece of one has what lies in it.
    """
    rows, cols = matrix_shape(shape)
    specs: dict[str, PartSpec] = {}
    if isinstance(fmt, PairFormat):
        num_high = min(_length(parts.get("high_scale"), 1), math.prod(grid_shape(fmt.block, rows, cols)))
        specs.update(_pair_specs(fmt, rows, cols, num_high))
    if fmt.sparse is not None:
        specs.update(_sparse_specs(fmt.sparse, rows, cols, _length(parts.get("sparse_values"), 0)))
    return specs


def _length(part: Tensor | None, axis: int) -> int:
    return 0 if part is None or part.dim() <= axis else part.shape[axis]


def _block_specs(fmt: BlockFormat, rows: int, cols: int) -> dict[str, PartSpec]:
    grid = grid_shape(fmt.block, rows, cols)
    width = padded_cols(fmt.block, cols)
    specs = {
        "codes": PartSpec(torch.uint8, (rows, row_bytes(width, fmt.element.bits))),
        "scale": PartSpec(scale_dtype(fmt), grid),
    }
    if fmt.tensor_scale is not None:
        specs["tensor_inv_scale"] = PartSpec(torch.float32, (1,))
    if fmt.sub_scale is not None:
        specs["sub_scale"] = PartSpec(torch.uint8, (rows, row_bytes(width // fmt.sub_scale.size, fmt.sub_scale.bits)))
    if fmt.zero_point is ZeroPoint.FP16:
        specs["zero_point"] = PartSpec(torch.float16, grid)
    elif fmt.zero_point is not None:
        specs["zero_point"] = PartSpec(torch.uint8, (grid[0], row_bytes(grid[1], fmt.zero_point_bits)))
    if fmt.index_bits:
        specs["index"] = PartSpec(torch.uint8, (rows, row_bytes(grid[1], fmt.index_bits)))
    return specs


def _sparse_specs(sparse: SparseTable, rows: int, cols: int, count: int) -> dict[str, PartSpec]:
    is_fp8 = sparse.element is SparseElement.FP8
    specs = {
        "sparse_values": PartSpec(torch.uint8 if is_fp8 else torch.float16, (count,)),
        "sparse_columns": PartSpec(torch.int16 if sparse_column_bits(cols) == 16 else torch.int32, (count,)),
        "sparse_offsets": PartSpec(torch.int32, (rows + 1,)),
    }
    if is_fp8:
        specs["sparse_scale"] = PartSpec(torch.float32, (1,))
    return specs


def _pair_specs(fmt: PairFormat, rows: int, cols: int, num_high: int) -> dict[str, PartSpec]:
    grid = grid_shape(fmt.block, rows, cols)
    specs = {"bitmap": PartSpec(torch.uint8, (rows, row_bytes(grid[1], 1)))}
    for prefix, part, count in (("low", fmt.low, grid[0] * grid[1] - num_high), ("high", fmt.high, num_high)):
        for name, spec in _block_specs(part, 1, count * fmt.block.size).items():
            specs[f"{prefix}_{name}"] = spec
    return specs
