"""Shapes of blocks: what cannot be one, and that equal shapes are equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from microscale.errors import FormatError
from microscale.formats.block_shape import Block, ChannelBlock, TensorBlock, TileBlock, VectorBlock


@pytest.mark.parametrize(
    ("make", "got"),
    [(lambda: VectorBlock(0), "got 0"), (lambda: TileBlock(0, 4), "got 0x4"), (lambda: TileBlock(4, -1), "got 4x-1")],
)
def test_a_block_holds_an_element(make: Callable[[], Block], got: str) -> None:
    with pytest.raises(FormatError, match=f"at least one element, {got}"):
        make()


@pytest.mark.parametrize("size", ["32", 2.5, None])
def test_a_size_is_a_whole_number(size: Any) -> None:
    for make in (lambda: VectorBlock(cast(int, size)), lambda: TileBlock(4, cast(int, size))):
        with pytest.raises(FormatError):
            make()


def test_equal_shapes_are_equal() -> None:
    shapes: list[Block] = [
        VectorBlock(32),
        VectorBlock(16),
        TileBlock(8, 4),
        TileBlock(4, 8),
        ChannelBlock(),
        TensorBlock(),
    ]
    assert len(set(shapes)) == 6 and VectorBlock(32) in shapes and TileBlock(8, 4) == TileBlock(8, 4)
