"""Cut a matrix into its blocks and put it together again; ragged ends are padded with zeros."""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional

from microscale.formats import Block, ChannelBlock, TensorBlock, TileBlock, VectorBlock
from microscale.layouts.row_major import padded_cols


def to_blocks(matrix: Shaped[Tensor, "rows cols"], block: Block) -> Shaped[Tensor, "grid_rows grid_cols size"]:
    """Return all blocks of a matrix, the elements of a block on the last axis in reading order."""
    rows, cols = matrix.shape
    match block:
        case VectorBlock(size=size):
            width = padded_cols(block, cols)
            return _pad(matrix, 0, width - cols).reshape(rows, width // size, size)
        case TileBlock(rows=tile_rows, cols=tile_cols):
            padded = _pad(matrix, -rows % tile_rows, -cols % tile_cols)
            tiles = padded.unflatten(1, (-1, tile_cols)).unflatten(0, (-1, tile_rows))
            return tiles.permute(0, 2, 1, 3).flatten(2)
        case ChannelBlock():
            return matrix.unsqueeze(1)
        case TensorBlock():
            return matrix.reshape(1, 1, -1)


def from_blocks(
    blocks: Shaped[Tensor, "grid_rows grid_cols size"], block: Block, rows: int, cols: int
) -> Shaped[Tensor, "rows cols"]:
    """Undo :func:`to_blocks`; with ``cols`` the padded width, the padding columns are kept, padding rows never."""
    match block:
        case VectorBlock():
            return blocks.flatten(1)[:, :cols]
        case TileBlock(rows=tile_rows, cols=tile_cols):
            tiles = blocks.unflatten(2, (tile_rows, tile_cols)).permute(0, 2, 1, 3)
            return tiles.flatten(2).flatten(0, 1)[:rows, :cols]
        case ChannelBlock():
            return blocks.squeeze(1)
        case TensorBlock():
            return blocks.reshape(rows, cols)


def _pad(matrix: Tensor, rows: int, cols: int) -> Tensor:
    return functional.pad(matrix, (0, cols, 0, rows)) if rows or cols else matrix
