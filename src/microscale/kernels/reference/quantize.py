"""quantize, dequantize, fake_quantize and linear for every format: the definition that all backends must meet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from microscale.errors import DtypeError, FormatError, NonFiniteError, ShapeError
from microscale.formats import BlockFormat, Extension, Format, PairFormat, VectorBlock, ZeroPoint, format_name
from microscale.formats.block import PLUSPLUS_DELTA_BITS
from microscale.kernels.reference.blocking import from_blocks, to_blocks
from microscale.kernels.reference.decode import decode_blocks
from microscale.kernels.reference.encode import EncodedBlocks, apply_value_policies, encode_matrix
from microscale.kernels.reference.scales import uses_amax
from microscale.kernels.reference.sparse import add_sparse, split_sparse
from microscale.layouts import matrix_shape, pack_bits, part_specs, unpack_bits
from microscale.layouts.row_major import grid_shape, high_count, padded_cols
from microscale.tensor import QuantizedTensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    values: Float[Tensor, "..."], fmt: Format, *, amax: Float[Tensor, "..."] | None = None, name: str = "the tensor"
) -> QuantizedTensor:
    """Quantize a tensor along its last axis; see :func:`microscale.kernels.ops.quantize` for the contract."""
    matrix = _as_matrix(values, fmt, name)
    rows, cols = matrix.shape
    _check_amax(amax, fmt, rows, cols, name)
    parts: dict[str, Tensor] = {}
    if fmt.sparse is not None:
        specs = part_specs(fmt, (rows, cols))
        matrix, parts = split_sparse(matrix, fmt.sparse, specs["sparse_columns"].dtype)
    if isinstance(fmt, PairFormat):
        dense_parts = _quantize_pair(matrix, fmt)
    else:
        dense_parts = _pack(encode_matrix(matrix, fmt, amax), fmt, rows, cols)
    return QuantizedTensor(format=fmt, shape=tuple(values.shape), dtype=values.dtype, parts={**dense_parts, **parts})


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype | None = None) -> Float[Tensor, "..."]:
    """Return the tensor's values; see :func:`microscale.kernels.ops.dequantize` for the contract."""
    rows, cols = tensor.rows, tensor.cols
    fmt = tensor.format
    if isinstance(fmt, PairFormat):
        matrix = _dequantize_pair(tensor.parts, fmt, rows, cols)
    else:
        matrix = _decode_parts(tensor.parts, fmt, rows, cols)
    if fmt.sparse is not None:
        matrix = add_sparse(matrix, fmt.sparse, dict(tensor.parts))
    return matrix.reshape(tensor.shape).to(dtype or tensor.dtype)


def fake_quantize(
    values: Float[Tensor, "..."], fmt: Format, *, amax: Float[Tensor, "..."] | None = None, name: str = "the tensor"
) -> Float[Tensor, "..."]:
    """Return dequantize(quantize(values)) without packing; the same numbers bit for bit."""
    if isinstance(fmt, PairFormat) or fmt.sparse is not None:
        return dequantize(quantize(values, fmt, amax=amax, name=name))
    matrix = _as_matrix(values, fmt, name)
    rows, cols = matrix.shape
    _check_amax(amax, fmt, rows, cols, name)
    blocks = decode_blocks(encode_matrix(matrix, fmt, amax), fmt)
    return from_blocks(blocks, fmt.block, rows, cols).reshape(values.shape).to(values.dtype)


def linear(
    inputs: Float[Tensor, "... cols"], weight: QuantizedTensor, bias: Float[Tensor, "rows"] | None
) -> Float[Tensor, "... rows"]:
    """Return inputs @ dequantize(weight).T + bias, computed in the dtype of the inputs."""
    return functional.linear(inputs, dequantize(weight, inputs.dtype), bias)


def _as_matrix(values: Tensor, fmt: Format, name: str) -> Float[Tensor, "rows cols"]:
    if values.dtype not in FLOAT_DTYPES:
        raise DtypeError(
            f"{name} must be float32, bfloat16 or float16 to be quantized, got {values.dtype}; cast it first"
        )
    rows, cols = matrix_shape(tuple(values.shape))
    if rows * cols == 0:
        raise ShapeError(f"{name} has shape {list(values.shape)}: an empty tensor cannot be quantized")
    matrix = values.detach().reshape(rows, cols).to(torch.float32)
    return apply_value_policies(matrix, fmt, name)


def _check_amax(amax: Tensor | None, fmt: Format, rows: int, cols: int, name: str) -> None:
    if amax is None:
        return
    if isinstance(fmt, PairFormat) or not uses_amax(fmt):
        raise FormatError(
            f"{format_name(fmt)} takes the scales of {name} from all numbers of each block; it cannot use a given amax,"
            " leave it out"
        )
    grid = grid_shape(fmt.block, rows, cols)
    if fmt.tensor_scale is None and not _fits(amax.shape, grid):
        raise ShapeError(f"the amax of {name} must fit its grid of blocks {list(grid)}, got {list(amax.shape)}")
    if not bool((torch.isfinite(amax) & (amax >= 0)).all()):
        raise NonFiniteError(f"the amax given for {name} must be finite and not negative; calibrate again")


def _fits(shape: tuple[int, ...], grid: tuple[int, int]) -> bool:
    padded = (1,) * (2 - len(shape)) + tuple(shape)
    return len(padded) == 2 and all(size in (1, wanted) for size, wanted in zip(padded, grid, strict=True))


def _pack(encoded: EncodedBlocks, fmt: BlockFormat, rows: int, cols: int) -> dict[str, Tensor]:
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
            index = index | encoded.delta.to(torch.int32) << _delta_shift(fmt)
        parts["index"] = pack_bits(index, fmt.index_bits)
    return parts


def _delta_shift(fmt: BlockFormat) -> int:
    """MX++ keeps its exponent difference in the bits above the index (bits 5 to 7 for blocks of 32)."""
    return fmt.index_bits - PLUSPLUS_DELTA_BITS


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
    is_wider = fmt.block == VectorBlock(32) or fmt.extension is Extension.PLUSPLUS
    shift = _delta_shift(fmt) if is_wider else fmt.index_bits
    max_idx = index & ((1 << shift) - 1)
    if fmt.extension is Extension.PLUSPLUS:
        return dataclasses.replace(encoded, max_idx=max_idx, delta=index >> shift)
    return dataclasses.replace(encoded, max_idx=max_idx)


def _quantize_pair(matrix: Tensor, fmt: PairFormat) -> dict[str, Tensor]:
    """Give the wide format to the blocks whose squared error it lowers most (the first of equal ones)."""
    blocks = to_blocks(matrix, fmt.block)
    grid_rows, grid_cols, size = blocks.shape
    lines = blocks.reshape(-1, size)
    finite = torch.where(torch.isfinite(lines), lines, 0.0)
    # Where both overflow to Inf there is no gain: their difference is NaN, which would sort first.
    gain = torch.nan_to_num(
        _line_error(finite, fmt.low) - _line_error(finite, fmt.high), posinf=math.inf, neginf=-math.inf
    )
    order = torch.sort(gain, descending=True, stable=True).indices
    is_high = torch.zeros(lines.shape[0], dtype=torch.bool, device=matrix.device)
    is_high[order[: high_count(fmt, lines.shape[0])]] = True
    parts = {"bitmap": pack_bits(is_high.to(torch.uint8).reshape(grid_rows, grid_cols), 1)}
    for prefix, part, chosen in (("low", fmt.low, ~is_high), ("high", fmt.high, is_high)):
        stream = lines[chosen].reshape(1, -1)
        packed = _pack(encode_matrix(stream, part), part, 1, stream.shape[1])
        parts.update({f"{prefix}_{name}": value for name, value in packed.items()})
    return parts


def _line_error(lines: Tensor, fmt: BlockFormat) -> Float[Tensor, "lines"]:
    restored = decode_blocks(encode_matrix(lines, fmt), fmt).flatten(1)
    return (restored - lines).to(torch.float64).square().sum(-1)


def _dequantize_pair(parts: Mapping[str, Tensor], fmt: PairFormat, rows: int, cols: int) -> Float[Tensor, "rows cols"]:
    size = fmt.block.size
    grid_rows, grid_cols = grid_shape(fmt.block, rows, cols)
    is_high = unpack_bits(parts["bitmap"], 1, grid_cols).reshape(-1).to(torch.bool)
    lines = torch.empty(grid_rows * grid_cols, size, dtype=torch.float32, device=is_high.device)
    for prefix, part, chosen in (("low", fmt.low, ~is_high), ("high", fmt.high, is_high)):
        own = {name.removeprefix(f"{prefix}_"): value for name, value in parts.items() if name.startswith(f"{prefix}_")}
        lines[chosen] = _decode_parts(own, part, 1, int(chosen.sum()) * size).reshape(-1, size)
    return from_blocks(lines.reshape(grid_rows, grid_cols, size), fmt.block, rows, cols)
