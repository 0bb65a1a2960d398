"""Blocks of a matrix: reading order, zero padding, and the way back."""

from __future__ import annotations

import pytest
import torch

from microscale.formats import Block, ChannelBlock, TensorBlock, TileBlock, VectorBlock
from microscale.kernels.reference.blocking import from_blocks, to_blocks
from microscale.layouts.row_major import grid_shape, padded_cols

BLOCKS = [VectorBlock(1), VectorBlock(4), VectorBlock(7), VectorBlock(100), TileBlock(2, 3), TileBlock(5, 4)]
BLOCKS += [TileBlock(1, 4), TileBlock(16, 16), ChannelBlock(), TensorBlock()]  # type: ignore[list-item]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (6, 12), (1, 40), (17, 3)])
def test_every_block_holds_its_elements_in_reading_order(block: Block, shape: tuple[int, int]) -> None:
    rows, cols = shape
    matrix = torch.arange(1, rows * cols + 1, dtype=torch.float32).reshape(shape)
    blocks = to_blocks(matrix, block)
    grid = grid_shape(block, rows, cols)
    assert blocks.shape[:2] == grid
    match block:
        case VectorBlock(size=size):
            high, wide = 1, size
        case TileBlock(rows=high, cols=wide):
            pass
        case ChannelBlock():
            high, wide = 1, cols
        case TensorBlock():
            high, wide = rows, cols
    padded = torch.nn.functional.pad(matrix, (0, grid[1] * wide - cols, 0, grid[0] * high - rows))
    for i in range(grid[0]):
        for j in range(grid[1]):
            expected = padded[i * high : (i + 1) * high, j * wide : (j + 1) * wide].flatten()
            assert torch.equal(blocks[i, j], expected)
    assert torch.equal(from_blocks(blocks, block, rows, cols), matrix)
    width = padded_cols(block, cols)
    assert torch.equal(from_blocks(blocks, block, rows, width), padded[:rows, :width])


@pytest.mark.parametrize("block", [VectorBlock(4), TileBlock(2, 4), ChannelBlock()], ids=str)
def test_no_rows_give_no_blocks(block: Block) -> None:
    blocks = to_blocks(torch.zeros(0, 8, dtype=torch.uint8), block)
    assert blocks.shape[0] == 0
    assert from_blocks(blocks, block, 0, 8).shape == (0, 8)
