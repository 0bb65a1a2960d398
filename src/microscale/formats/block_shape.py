"""Which elements share a scale: runs of the last axis, tiles, whole rows, or the whole tensor."""

from __future__ import annotations

from dataclasses import dataclass

from microscale.errors import FormatError
from microscale.formats.fields import check_fields


@dataclass(frozen=True, slots=True)
class VectorBlock:
    """``size`` consecutive elements of the last axis share a scale; a ragged last block is padded with zeros."""

    size: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.size < 1:
            raise FormatError(f"a block holds at least one element, got {self.size}")


@dataclass(frozen=True, slots=True)
class TileBlock:
    """A tile of ``rows`` x ``cols`` elements of the last two axes shares a scale; ragged ones are padded with zeros."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 1 or self.cols < 1:
            raise FormatError(f"a tile holds at least one element, got {self.rows}x{self.cols}")


@dataclass(frozen=True, slots=True)
class ChannelBlock:
    """One scale for each row (the whole last axis): per output channel of a weight, per token of an activation."""


@dataclass(frozen=True, slots=True)
class TensorBlock:
    """One scale for the whole tensor."""


Block = VectorBlock | TileBlock | ChannelBlock | TensorBlock
