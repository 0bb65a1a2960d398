"""Cut and join the parts of row_major along rows and columns, bit for bit: nothing is decoded or rounded.

Places count elements. A cut lies between blocks; what a whole axis shares (the scale of a channel or of the tensor)
stays with every piece, and pieces join only where they share the same. A sparse table and the two streams of a pair
hold what lies in the piece, so that their lengths may differ from the share that the format names.

Rows are views of what they are cut from; columns, tables and streams are copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from microscale.errors import FormatError
from microscale.formats import (
    Block,
    BlockFormat,
    ChannelBlock,
    Format,
    PairFormat,
    TensorBlock,
    TileBlock,
    VectorBlock,
    ZeroPoint,
    format_name,
)
from microscale.formats.block import sparse_column_bits
from microscale.layouts.bits import pack_bits, unpack_bits
from microscale.layouts.row_major import grid_shape, padded_cols

Parts = Mapping[str, Tensor]


class Axis(Enum):
    """Along what a matrix is cut or joined; the value is the place in its shape."""

    ROWS = 0
    COLS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """How one part lies over the elements: each number of it belongs to ``rows`` x ``cols`` of them.

    None: to the whole axis. ``bits`` is the width of a number in a dense row; None: one item of the part each.
    """

    rows: int | None
    cols: int | None
    bits: int | None = None


def steps(block: Block) -> tuple[int | None, int | None]:
    """Return how many rows and columns a block spans; None: a whole axis."""
    match block:
        case VectorBlock(size=size):
            return 1, size
        case TileBlock(rows=rows, cols=cols):
            return rows, cols
        case ChannelBlock():
            return 1, None
        case TensorBlock():
            return None, None


def _grids(fmt: BlockFormat) -> dict[str, _Grid]:
    rows, cols = steps(fmt.block)
    grids = {"codes": _Grid(rows=1, cols=1, bits=fmt.element.bits), "scale": _Grid(rows=rows, cols=cols)}
    if fmt.tensor_scale is not None:
        grids["tensor_inv_scale"] = _Grid(rows=None, cols=None)
    if fmt.sub_scale is not None:
        grids["sub_scale"] = _Grid(rows=1, cols=fmt.sub_scale.size, bits=fmt.sub_scale.bits)
    if fmt.zero_point is not None:
        bits = None if fmt.zero_point is ZeroPoint.FP16 else fmt.zero_point_bits
        grids["zero_point"] = _Grid(rows=rows, cols=cols, bits=bits)
    if fmt.index_bits:
        grids["index"] = _Grid(rows=rows, cols=cols, bits=fmt.index_bits)
    return grids


def cut_refusal(block: Block, axis: Axis, begin: int, end: int, length: int) -> str | None:
    """Return why a piece of an axis cannot be cut out, or None: a cut lies between blocks."""
    step = steps(block)[axis.value] or 1
    if begin % step == 0 and (end % step == 0 or end == length):
        return None
    return f"a block spans {step} {axis.name.lower()}, so that cuts lie at multiples of {step} (or at the end)"


def slice_parts(
    parts: Parts, fmt: Format, shape: tuple[int, int], axis: Axis, begin: int, end: int
) -> dict[str, Tensor]:
    """Return the parts of rows or columns ``begin`` to ``end`` of a matrix; the cut lies between blocks."""
    if isinstance(fmt, PairFormat):
        piece = _slice_pair(parts, fmt, shape, axis, begin, end)
    else:
        assert isinstance(fmt, BlockFormat)
        piece = _slice_block(parts, fmt, shape, axis, begin, end)
    if fmt.sparse is not None:
        piece.update(_slice_sparse(parts, shape, axis, begin, end))
    return piece


def join_parts(
    pieces: Sequence[Parts], fmt: Format, shapes: Sequence[tuple[int, int]], axis: Axis
) -> dict[str, Tensor]:
    """Return the parts of matrices under each other or side by side; all but the last consist of whole blocks.

    Raises:
        FormatError: a scale that a whole axis shares differs between them.
    """
    if isinstance(fmt, PairFormat):
        joined = _join_pair(pieces, fmt, shapes, axis)
    else:
        assert isinstance(fmt, BlockFormat)
        joined = _join_block(pieces, fmt, shapes, axis)
    if fmt.sparse is not None:
        joined.update(_join_sparse(pieces, fmt, shapes, axis))
    return joined


def pick_rows(parts: Parts, fmt: BlockFormat, rows: slice | Tensor) -> dict[str, Tensor]:
    """Return the parts of some rows of blocks, in that order; what all rows share stays."""
    return {name: parts[name] if grid.rows is None else parts[name][rows] for name, grid in _grids(fmt).items()}


def _slice_block(
    parts: Parts, fmt: BlockFormat, shape: tuple[int, int], axis: Axis, begin: int, end: int
) -> dict[str, Tensor]:
    if axis is Axis.COLS:
        unit = steps(fmt.block)[1] or 1
        return _pick_cols(parts, fmt, shape[1], slice(begin // unit, -(-end // unit)))
    return {
        name: parts[name] if grid.rows is None else parts[name][begin // grid.rows : -(-end // grid.rows)]
        for name, grid in _grids(fmt).items()
    }


def _join_block(
    pieces: Sequence[Parts], fmt: BlockFormat, shapes: Sequence[tuple[int, int]], axis: Axis
) -> dict[str, Tensor]:
    joined: dict[str, Tensor] = {}
    for name, grid in _grids(fmt).items():
        own = [piece[name] for piece in pieces]
        if (grid.rows if axis is Axis.ROWS else grid.cols) is None:
            joined[name] = _shared(own, name, fmt)
        elif axis is Axis.ROWS:
            joined[name] = torch.cat(own)
        else:
            units = [_units(part, grid, fmt, cols) for part, (_, cols) in zip(own, shapes, strict=True)]
            joined[name] = _from_units(torch.cat(units, dim=1), grid, fmt)
    return joined


def _pick_cols(parts: Parts, fmt: BlockFormat, cols: int, picked: slice | Tensor) -> dict[str, Tensor]:
    """Return the parts of some blocks of each row (of some columns, where a block spans whole rows), in that order."""
    return {
        name: parts[name]
        if grid.cols is None
        else _from_units(_units(parts[name], grid, fmt, cols)[:, picked], grid, fmt)
        for name, grid in _grids(fmt).items()
    }


def _units(part: Tensor, grid: _Grid, fmt: BlockFormat, cols: int) -> Tensor:
    """Return a part as [rows, units, items]: a unit is a block, or a column where blocks span whole rows.

    Items are the bytes of the unit where it fills whole bytes, else its numbers.
    """
    assert grid.cols is not None
    unit = steps(fmt.block)[1] or 1
    count = padded_cols(fmt.block, cols) // unit
    numbers = unit // grid.cols
    if grid.bits is None:
        items = numbers
    elif numbers * grid.bits % 8 == 0:
        items = numbers * grid.bits // 8
    else:
        part, items = unpack_bits(part, grid.bits, count * numbers), numbers
    return part.reshape(part.shape[0], count, items)


def _from_units(units: Tensor, grid: _Grid, fmt: BlockFormat) -> Tensor:
    assert grid.cols is not None
    unit = steps(fmt.block)[1] or 1
    flat = units.flatten(1).contiguous()
    is_packed = grid.bits is None or unit // grid.cols * grid.bits % 8 == 0
    return flat if is_packed or grid.bits is None else pack_bits(flat, grid.bits)


def _shared(own: Sequence[Tensor], name: str, fmt: Format) -> Tensor:
    first = own[0].contiguous().view(torch.uint8)
    for other in own[1:]:
        if not torch.equal(first, other.contiguous().view(torch.uint8)):
            raise FormatError(
                f"tensors of {format_name(fmt)} join here only where they have the same {name}, got {own[0].tolist()}"
                f" and {other.tolist()}; dequantize them, join the values and quantize these together"
            )
    return own[0]


def _stream(parts: Parts, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in parts.items() if name.startswith(prefix)}


def _is_high(parts: Parts, fmt: PairFormat, shape: tuple[int, int]) -> Bool[Tensor, "rows grid_cols"]:
    return unpack_bits(parts["bitmap"], 1, grid_shape(fmt.block, *shape)[1]).to(torch.bool)


def _streams(fmt: PairFormat, is_high: Sequence[Tensor]) -> list[tuple[str, BlockFormat, list[Tensor]]]:
    """Return prefix, format and the blocks of both streams, as masks over the blocks of each piece."""
    return [("low_", fmt.low, [~mask for mask in is_high]), ("high_", fmt.high, list(is_high))]


def _places(chosen: Bool[Tensor, "rows grid_cols"]) -> Integer[Tensor, "rows grid_cols"]:
    """Return the place in its stream of each block that is in it."""
    return (chosen.flatten().cumsum(0) - 1).view(chosen.shape)


def _slice_pair(
    parts: Parts, fmt: PairFormat, shape: tuple[int, int], axis: Axis, begin: int, end: int
) -> dict[str, Tensor]:
    unit = steps(fmt.block)[axis.value] or 1
    first, count = begin // unit, -(-end // unit) - begin // unit
    is_high = _is_high(parts, fmt, shape)
    piece = {"bitmap": pack_bits(is_high.narrow(axis.value, first, count).to(torch.uint8), 1)}
    for prefix, part, (mask,) in _streams(fmt, [is_high]):
        places, inside = (grid.narrow(axis.value, first, count) for grid in (_places(mask), mask))
        width = int(mask.sum()) * fmt.block.size
        picked = _pick_cols(_stream(parts, prefix), part, width, places[inside])
        piece.update({prefix + name: value for name, value in picked.items()})
    return piece


def _join_pair(
    pieces: Sequence[Parts], fmt: PairFormat, shapes: Sequence[tuple[int, int]], axis: Axis
) -> dict[str, Tensor]:
    is_high = [_is_high(piece, fmt, shape) for piece, shape in zip(pieces, shapes, strict=True)]
    joined = {"bitmap": pack_bits(torch.cat(is_high, dim=axis.value).to(torch.uint8), 1)}
    for prefix, part, masks in _streams(fmt, is_high):
        counts = [int(mask.sum()) for mask in masks]
        lines = [(1, count * fmt.block.size) for count in counts]
        stream = _join_block([_stream(piece, prefix) for piece in pieces], part, lines, Axis.COLS)
        starts = [sum(counts[:index]) for index in range(len(counts))]
        places = torch.cat([_places(mask) + start for mask, start in zip(masks, starts, strict=True)], dim=axis.value)
        order = places[torch.cat(masks, dim=axis.value)]
        picked = _pick_cols(stream, part, sum(counts) * fmt.block.size, order)
        joined.update({prefix + name: value for name, value in picked.items()})
    return joined


def _table_places(parts: Parts) -> list[Integer[Tensor, "count"]]:
    """Return row and column of each value of a sparse table."""
    counts = parts["sparse_offsets"].diff().to(torch.int64)
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    return [rows, parts["sparse_columns"].to(torch.int64)]


def _table(values: Tensor, places: Sequence[Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    counts = torch.bincount(places[0], minlength=shape[0])
    dtype = torch.int16 if sparse_column_bits(shape[1]) == 16 else torch.int32
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return {"sparse_values": values, "sparse_columns": places[1].to(dtype), "sparse_offsets": offsets}


def _slice_sparse(parts: Parts, shape: tuple[int, int], axis: Axis, begin: int, end: int) -> dict[str, Tensor]:
    places = _table_places(parts)
    along = places[axis.value]
    is_inside = (along >= begin) & (along < end)
    places[axis.value] = along - begin
    table = _table(
        parts["sparse_values"][is_inside], [each[is_inside] for each in places], _cut(shape, axis, end - begin)
    )
    return table | {name: part for name, part in parts.items() if name == "sparse_scale"}


def _join_sparse(
    pieces: Sequence[Parts], fmt: Format, shapes: Sequence[tuple[int, int]], axis: Axis
) -> dict[str, Tensor]:
    lengths = [shape[axis.value] for shape in shapes]
    shape = _cut(shapes[0], axis, sum(lengths))
    moved: list[list[Tensor]] = []
    for index, piece in enumerate(pieces):
        places = _table_places(piece)
        places[axis.value] = places[axis.value] + sum(lengths[:index])
        moved.append(places)
    rows, cols = (torch.cat(each) for each in zip(*moved, strict=True))
    order = torch.argsort(rows * shape[1] + cols)
    table = _table(torch.cat([piece["sparse_values"] for piece in pieces])[order], [rows[order], cols[order]], shape)
    name = "sparse_scale"
    return table | ({name: _shared([piece[name] for piece in pieces], name, fmt)} if name in pieces[0] else {})


def _cut(shape: tuple[int, int], axis: Axis, length: int) -> tuple[int, int]:
    return (length, shape[1]) if axis is Axis.ROWS else (shape[0], length)
