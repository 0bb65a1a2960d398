"""Segments: consecutive columns of one tensor in different formats, and the union of all format records.

A tensor [..., cols] of a :class:`SegmentedFormat` is nothing but its segments side by side: each is quantized, stored
and restored as a tensor of its own. So a layer's channels may have 4, 6 and 8 bits (arXiv 2508.02343), or any others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from microscale.errors import FormatError
from microscale.formats.block import BlockFormat, PairFormat
from microscale.formats.block_shape import TileBlock
from microscale.formats.fields import check_fields
from microscale.formats.policies import InfPolicy, NaNPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """``cols`` consecutive columns in one format.

    Raises:
        FormatError: no columns.
    """

    format: BlockFormat
    cols: int

    def __post_init__(self) -> None:
        check_fields(self)
        if self.cols < 1:
            raise FormatError(f"a segment has at least one column, got {self.cols}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentedFormat:
    """The segments of a tensor in the order of their columns; it belongs to tensors of exactly their width.

    Raises:
        FormatError: no segments, or a format that needs more than its own columns.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.segments:
            raise FormatError("segments: at least one is needed")
        for segment in self.segments:
            if segment.format.sparse is not None or isinstance(segment.format.block, TileBlock):
                raise FormatError("segments: a sparse table or tiles inside a segment are not possible")
        if len({segment.format.inf_policy for segment in self.segments}) != 1:
            raise FormatError("segments: all formats need the same policy for Inf")

    @property
    def cols(self) -> int:
        """Columns of all segments together."""
        return sum(segment.cols for segment in self.segments)

    @property
    def sparse(self) -> None:
        """There is no sparse table beside segments."""
        return None

    @property
    def nan_policy(self) -> NaNPolicy:
        """Raise where any segment raises."""
        raises = any(segment.format.nan_policy is NaNPolicy.RAISE for segment in self.segments)
        return NaNPolicy.RAISE if raises else NaNPolicy.POISON_BLOCK

    @property
    def inf_policy(self) -> InfPolicy:
        """The common policy."""
        return self.segments[0].format.inf_policy

    def bits_per_value(self, rows: int | None = None, cols: int | None = None) -> float:
        """Bits for each element: the mean of the segments by their columns; ``cols`` is known already."""
        bits = sum(segment.cols * segment.format.bits_per_value(rows, segment.cols) for segment in self.segments)
        return bits / self.cols

    def places(self) -> Iterator[tuple[BlockFormat, slice]]:
        """Yield the format and the columns of each segment."""
        start = 0
        for segment in self.segments:
            yield segment.format, slice(start, start + segment.cols)
            start += segment.cols


Format = BlockFormat | PairFormat | SegmentedFormat
RECORDS = (BlockFormat, PairFormat, SegmentedFormat)
"""The kinds of format records."""
