"""The parts of segments: those of every segment as a tensor of its own, under names that begin with ``s<i>_``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from microscale.errors import ShapeError
from microscale.formats import BlockFormat, SegmentedFormat, format_name

PartT = TypeVar("PartT")


def prefix(index: int) -> str:
    """Return what the names of a segment's parts begin with."""
    return f"s{index}_"


def shapes(fmt: SegmentedFormat, shape: tuple[int, ...]) -> list[tuple[BlockFormat, tuple[int, ...]]]:
    """Return format and shape of each segment.

    Raises:
        ShapeError: a tensor of another width.
    """
    if not shape or shape[-1] != fmt.cols:
        raise ShapeError(f"{format_name(fmt)} is for tensors of {fmt.cols} columns, got the shape {list(shape)}")
    return [(segment.format, (*shape[:-1], segment.cols)) for segment in fmt.segments]


def split_parts(parts: Mapping[str, PartT], fmt: SegmentedFormat) -> list[dict[str, PartT]]:
    """Return the parts of each segment under their own names."""
    starts = [prefix(index) for index in range(len(fmt.segments))]
    return [
        {name.removeprefix(start): part for name, part in parts.items() if name.startswith(start)} for start in starts
    ]


def name_parts(segments: list[dict[str, PartT]]) -> dict[str, PartT]:
    """Return the parts of all segments under the names that they have together."""
    return {prefix(index) + name: part for index, segment in enumerate(segments) for name, part in segment.items()}


def first_refusal(
    refusal: Callable[[BlockFormat, tuple[int, ...]], str | None], fmt: SegmentedFormat, shape: tuple[int, ...]
) -> str | None:
    """Return why a layout has no place for a segment, or None."""
    reasons = [(part, refusal(part, own)) for part, own in shapes(fmt, shape)]
    return next((f"{format_name(part)}: {reason}" for part, reason in reasons if reason is not None), None)


def relayout(
    move: Callable[[Mapping[str, Tensor], BlockFormat, tuple[int, ...]], dict[str, Tensor]],
    parts: Mapping[str, Tensor],
    fmt: SegmentedFormat,
    shape: tuple[int, ...],
) -> dict[str, Tensor]:
    """Move the parts of each segment from one layout to another."""
    pairs = zip(split_parts(parts, fmt), shapes(fmt, shape), strict=True)
    return name_parts([move(own, part, own_shape) for own, (part, own_shape) in pairs])
