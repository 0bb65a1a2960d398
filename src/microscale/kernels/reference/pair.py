"""Block-adaptive pairs: which blocks get the wide format, and the two streams; every backend brings its own codec."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.formats import BlockFormat, Draw, PairFormat
from microscale.formats.draw import part_draw
from microscale.kernels.reference.blocking import from_blocks, to_blocks
from microscale.layouts import pack_bits, unpack_bits
from microscale.layouts.row_major import grid_shape, high_count


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCodec:
    """What a backend does with plain blocks.

    ``encode`` turns a float32 matrix into packed parts, ``restore`` returns what a matrix becomes (both by a draw, or
    the format's own), and ``decode`` turns parts, rows and cols into a float32 matrix.
    """

    encode: Callable[[Tensor, BlockFormat, Draw | None], dict[str, Tensor]]
    restore: Callable[[Tensor, BlockFormat, Draw | None], Tensor]
    decode: Callable[[Mapping[str, Tensor], BlockFormat, int, int], Tensor]


def quantize_pair(
    matrix: Float[Tensor, "rows cols"], fmt: PairFormat, codec: PairCodec, draw: Draw | None = None
) -> dict[str, Tensor]:
    """Give the wide format to the blocks whose squared error it lowers most (the first of equal ones)."""
    blocks = to_blocks(matrix, fmt.block)
    grid_rows, grid_cols, size = blocks.shape
    lines = blocks.reshape(-1, size)
    finite = torch.where(torch.isfinite(lines), lines, 0.0)
    low, high = part_draw(draw, 0), part_draw(draw, 1)
    # Where both overflow to Inf there is no gain: their difference is NaN, which would sort first.
    gain = torch.nan_to_num(
        _line_error(finite, codec.restore(finite, fmt.low, low))
        - _line_error(finite, codec.restore(finite, fmt.high, high)),
        posinf=math.inf,
        neginf=-math.inf,
    )
    order = torch.sort(gain, descending=True, stable=True).indices
    is_high = torch.zeros(lines.shape[0], dtype=torch.bool, device=matrix.device)
    is_high[order[: high_count(fmt, lines.shape[0])]] = True
    parts = {"bitmap": pack_bits(is_high.to(torch.uint8).reshape(grid_rows, grid_cols), 1)}
    for prefix, part, chosen, own in (("low", fmt.low, ~is_high, low), ("high", fmt.high, is_high, high)):
        packed = codec.encode(lines[chosen].reshape(1, -1), part, own)
        parts.update({f"{prefix}_{name}": value for name, value in packed.items()})
    return parts


def _line_error(lines: Tensor, restored: Tensor) -> Float[Tensor, "lines"]:
    return (restored - lines).to(torch.float64).square().sum(-1)


def dequantize_pair(
    parts: Mapping[str, Tensor], fmt: PairFormat, rows: int, cols: int, codec: PairCodec
) -> Float[Tensor, "rows cols"]:
    """Return the float32 values of both streams, each block in its place."""
    size = fmt.block.size
    grid_rows, grid_cols = grid_shape(fmt.block, rows, cols)
    is_high = unpack_bits(parts["bitmap"], 1, grid_cols).reshape(-1).to(torch.bool)
    lines = torch.empty(grid_rows * grid_cols, size, dtype=torch.float32, device=is_high.device)
    for prefix, part, chosen in (("low", fmt.low, ~is_high), ("high", fmt.high, is_high)):
        own = {name.removeprefix(f"{prefix}_"): value for name, value in parts.items() if name.startswith(f"{prefix}_")}
        lines[chosen] = codec.decode(own, part, 1, int(chosen.sum()) * size).reshape(-1, size)
    return from_blocks(lines.reshape(grid_rows, grid_cols, size), fmt.block, rows, cols)
