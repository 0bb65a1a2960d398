"""quantize, dequantize, fake_quantize and linear for every format: the definition that all backends must meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.formats import (
    BlockFormat,
    ChannelBlock,
    Draw,
    Format,
    PairFormat,
    Rounding,
    SegmentedFormat,
    VectorBlock,
    ZeroPoint,
)
from microscale.formats.draw import part_draw
from microscale.kernels.checks import check_amax, check_values, uses_amax
from microscale.kernels.reference.blocking import from_blocks, to_blocks
from microscale.kernels.reference.decode import decode_blocks
from microscale.kernels.reference.encode import EncodedBlocks, encode_matrix, float32_values, refuse_nonfinite
from microscale.kernels.reference.layout import to_layout
from microscale.kernels.reference.pair import PairCodec, dequantize_pair, quantize_pair
from microscale.kernels.reference.sparse import add_sparse, split_sparse
from microscale.kernels.straight_through import straight_through
from microscale.layouts import pack_bits, part_specs, unpack_bits
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.layouts.row_major import grid_shape, padded_cols
from microscale.tensor import QuantizedTensor, join_segments


def quantize(
    values: Float[Tensor, "..."],
    fmt: Format,
    *,
    amax: Float[Tensor, "..."] | None = None,
    draw: Draw | None = None,
    name: str = "the tensor",
) -> QuantizedTensor:
    """Quantize a tensor along its last axis; see :func:`microscale.kernels.ops.quantize` for the contract."""
    matrix = _as_matrix(values, fmt, name)
    rows, cols = matrix.shape
    check_amax(amax, fmt, rows, cols, name)
    if isinstance(fmt, SegmentedFormat):
        pieces = [
            quantize(values[..., at], part, draw=part_draw(draw, index), name=name)
            for index, (part, at) in enumerate(fmt.places())
        ]
        return join_segments(pieces, fmt)
    parts: dict[str, Tensor] = {}
    if isinstance(fmt, PairFormat) or fmt.sparse is not None:
        dense = float32_values(matrix, fmt)
        if fmt.sparse is not None:
            specs = part_specs(fmt, (rows, cols))
            dense, parts = split_sparse(dense, fmt.sparse, specs["sparse_columns"].dtype)
        if isinstance(fmt, PairFormat):
            parts = {**quantize_pair(dense, fmt, PAIR_CODEC, draw), **parts}
        else:
            parts = {**pack_encoded(encode_matrix(dense, fmt, amax, draw), fmt, rows, cols), **parts}
    else:
        pieces = [
            pack_encoded(encoded, fmt, piece.shape[0], cols)
            for piece, encoded in _encode_pieces(matrix, fmt, amax, draw)
        ]
        parts = join_chunks(pieces)
    return QuantizedTensor(format=fmt, shape=tuple(values.shape), dtype=values.dtype, parts=parts)


def dequantize(
    tensor: QuantizedTensor, dtype: torch.dtype | None = None, out: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Return the tensor's values; see :func:`microscale.kernels.ops.dequantize` for the contract."""
    tensor = to_layout(tensor, ROW_MAJOR)
    rows, cols = tensor.rows, tensor.cols
    fmt = tensor.format
    wanted = dtype or tensor.dtype
    if isinstance(fmt, SegmentedFormat):
        joined = torch.cat([dequantize(segment, wanted) for segment in tensor.segments], dim=-1)
        return joined if out is None else out.copy_(joined)
    if isinstance(fmt, PairFormat):
        matrix = dequantize_pair(tensor.parts, fmt, rows, cols, PAIR_CODEC)
    elif fmt.sparse is None and has_row_blocks(fmt):
        matrix = torch.empty(rows, cols, dtype=wanted, device=tensor.device)
        for start, stop in _row_pieces(rows, cols):
            own = {name: part if name == WHOLE_PART else part[start:stop] for name, part in tensor.parts.items()}
            matrix[start:stop] = _decode_parts(own, fmt, stop - start, cols)
    else:
        matrix = _decode_parts(tensor.parts, fmt, rows, cols)
    if fmt.sparse is not None:
        matrix = add_sparse(matrix, fmt.sparse, dict(tensor.parts))
    values = matrix.reshape(tensor.shape).to(wanted)
    return values if out is None else out.copy_(values)


def fake_quantize(
    values: Float[Tensor, "..."],
    fmt: Format,
    *,
    amax: Float[Tensor, "..."] | None = None,
    draw: Draw | None = None,
    name: str = "the tensor",
) -> Float[Tensor, "..."]:
    """Return dequantize(quantize(values)) without packing; the same numbers bit for bit."""
    if isinstance(fmt, PairFormat) or fmt.sparse is not None:
        return dequantize(quantize(values, fmt, amax=amax, draw=draw, name=name))
    matrix = _as_matrix(values, fmt, name)
    rows, cols = matrix.shape
    check_amax(amax, fmt, rows, cols, name)
    if isinstance(fmt, SegmentedFormat):
        pieces = [
            fake_quantize(values[..., at], part, draw=part_draw(draw, index), name=name)
            for index, (part, at) in enumerate(fmt.places())
        ]
        return torch.cat(pieces, dim=-1)
    result = torch.empty_like(matrix)
    done = 0
    for piece, encoded in _encode_pieces(matrix, fmt, amax, draw):
        count = piece.shape[0]
        result[done : done + count] = from_blocks(decode_blocks(encoded, fmt), fmt.block, count, cols)
        done += count
    return result.reshape(values.shape)


PIECE_ELEMENTS = 1 << 20
"""Rows are worked on in pieces of about this many elements, which bounds the memory of intermediate results."""

WHOLE_PART = "tensor_inv_scale"


def has_row_blocks(fmt: BlockFormat) -> bool:
    """Whether a row's codes depend on no other row (but for a scale of the whole tensor)."""
    return isinstance(fmt.block, VectorBlock | ChannelBlock)


def _row_pieces(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE_ELEMENTS // max(1, cols))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _encode_pieces(
    matrix: Tensor, fmt: BlockFormat, amax: Tensor | None, draw: Draw | None
) -> Iterator[tuple[Tensor, EncodedBlocks]]:
    """Encode piece by piece where that changes nothing, else all at once."""
    rows, cols = matrix.shape
    has_two_levels = fmt.tensor_scale is not None
    can_split = has_row_blocks(fmt) and fmt.rounding is not Rounding.STOCHASTIC
    if matrix.numel() <= PIECE_ELEMENTS or not can_split or (has_two_levels and not uses_amax(fmt)):
        piece = float32_values(matrix, fmt)
        yield piece, encode_matrix(piece, fmt, amax, draw)
        return
    if has_two_levels and amax is None:
        amax = torch.stack([_finite_amax(matrix[a:b], fmt) for a, b in _row_pieces(rows, cols)]).amax().reshape(1)
    grid = None if amax is None or has_two_levels else amax.expand(grid_shape(fmt.block, rows, cols))
    for start, stop in _row_pieces(rows, cols):
        piece = float32_values(matrix[start:stop], fmt)
        yield piece, encode_matrix(piece, fmt, amax if grid is None else grid[start:stop])


def _finite_amax(piece: Tensor, fmt: BlockFormat) -> Float[Tensor, ""]:
    """Return the largest magnitude over all blocks that are not poisoned."""
    amax = to_blocks(float32_values(piece, fmt), fmt.block).abs().amax(-1)
    return torch.where(torch.isfinite(amax), amax, 0.0).amax()


def join_chunks(pieces: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put the parts of consecutive rows together."""
    if len(pieces) == 1:
        return pieces[0]
    return {
        name: first if name == WHOLE_PART else torch.cat([piece[name] for piece in pieces])
        for name, first in pieces[0].items()
    }


def linear(
    inputs: Float[Tensor, "... cols"],
    weight: QuantizedTensor,
    bias: Float[Tensor, "rows"] | None,
    activations: Format | None = None,
) -> Float[Tensor, "... rows"]:
    """Return inputs @ dequantize(weight).T + bias, computed in their dtype; gradients pass a rounding unchanged."""
    if activations is not None and inputs.numel():
        inputs = straight_through(inputs, lambda kept: fake_quantize(kept, activations, name="the inputs of linear"))
    added = None if bias is None else bias.to(inputs.dtype)
    return functional.linear(inputs, dequantize(weight, inputs.dtype), added)


def linear_mixed(
    inputs: Float[Tensor, "... cols"],
    weights: Sequence[QuantizedTensor],
    activations: Sequence[Format | None],
    bias: Float[Tensor, "rows"] | None,
) -> Float[Tensor, "... rows"]:
    """Return the sum of linear over consecutive segments of the columns, computed in the dtype of the inputs."""
    segments = inputs.split([weight.cols for weight in weights], dim=-1)
    products = [linear(*each[:2], None, each[2]) for each in zip(segments, weights, activations, strict=True)]
    return sum(products[1:], products[0]) if bias is None else sum(products, bias.to(inputs.dtype))


def _as_matrix(values: Tensor, fmt: Format, name: str) -> Float[Tensor, "rows cols"]:
    rows, cols = check_values(values, name)
    refuse_nonfinite(values, fmt, name)
    return values.detach().reshape(rows, cols)


def pack_encoded(encoded: EncodedBlocks, fmt: BlockFormat, rows: int, cols: int) -> dict[str, Tensor]:
    """Return the parts of row_major: codes packed to their bits, scales as stored."""
    width = padded_cols(fmt.block, cols)
    parts = {
        "codes": pack_bits(from_blocks(encoded.codes, fmt.block, rows, width), fmt.element.bits),
        "scale": encoded.scale.contiguous(),
    }
    if encoded.tensor_inv_scale is not None:
        parts["tensor_inv_scale"] = encoded.tensor_inv_scale
    if encoded.sub_scale is not None:
        assert fmt.sub_scale is not None
        parts["sub_scale"] = pack_bits(encoded.sub_scale.flatten(1), fmt.sub_scale.bits)
    if encoded.zero_point is not None:
        is_wide = fmt.zero_point is ZeroPoint.FP16
        parts["zero_point"] = encoded.zero_point if is_wide else pack_bits(encoded.zero_point, fmt.zero_point_bits)
    if encoded.max_idx is not None:
        index = encoded.max_idx.to(torch.int32)
        if encoded.delta is not None:
            index = index | encoded.delta.to(torch.int32) << fmt.place_bits
        parts["index"] = pack_bits(index, fmt.index_bits)
    return parts


def _decode_parts(parts: Mapping[str, Tensor], fmt: BlockFormat, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
    width = padded_cols(fmt.block, cols)
    grid_cols = grid_shape(fmt.block, rows, cols)[1]
    codes = to_blocks(unpack_bits(parts["codes"], fmt.element.bits, width), fmt.block)
    encoded = EncodedBlocks(codes=codes, scale=parts["scale"], tensor_inv_scale=parts.get("tensor_inv_scale"))
    if fmt.sub_scale is not None:
        groups = unpack_bits(parts["sub_scale"], fmt.sub_scale.bits, width // fmt.sub_scale.size)
        per_block = codes.shape[-1] // fmt.sub_scale.size
        encoded = dataclasses.replace(encoded, sub_scale=groups.unflatten(1, (grid_cols, per_block)))
    if fmt.zero_point is not None:
        zero = parts["zero_point"]
        if fmt.zero_point is not ZeroPoint.FP16:
            zero = unpack_bits(zero, fmt.zero_point_bits, grid_cols)
        encoded = dataclasses.replace(encoded, zero_point=zero)
    if fmt.index_bits:
        encoded = _with_index(encoded, unpack_bits(parts["index"], fmt.index_bits, grid_cols).to(torch.int32), fmt)
    return from_blocks(decode_blocks(encoded, fmt), fmt.block, rows, cols)


def _with_index(encoded: EncodedBlocks, index: Tensor, fmt: BlockFormat) -> EncodedBlocks:
    max_idx = index & ((1 << fmt.place_bits) - 1)
    if fmt.delta_bits:
        return dataclasses.replace(encoded, max_idx=max_idx, delta=index >> fmt.place_bits)
    return dataclasses.replace(encoded, max_idx=max_idx)


def _encode_stream(stream: Tensor, fmt: BlockFormat, draw: Draw | None) -> dict[str, Tensor]:
    return pack_encoded(encode_matrix(stream, fmt, draw=draw), fmt, stream.shape[0], stream.shape[1])


def _restore_lines(lines: Tensor, fmt: BlockFormat, draw: Draw | None) -> Float[Tensor, "lines size"]:
    return decode_blocks(encode_matrix(lines, fmt, draw=draw), fmt).flatten(1)


PAIR_CODEC = PairCodec(encode=_encode_stream, restore=_restore_lines, decode=_decode_parts)
