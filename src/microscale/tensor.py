"""QuantizedTensor: the packed parts of one tensor with format, layout and shape; frozen, no maths.

Its bytes are what a checkpoint of ours holds. Kernels make it (``quantize``) and read it (``dequantize``,
``linear``). It can be cut and joined without being decoded: for tensor parallel layers and fused projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from microscale.errors import (
    ArgumentError,
    DtypeError,
    FormatError,
    LayoutError,
    RowError,
    ShapeError,
    check_kind,
    shown,
)
from microscale.formats import (
    BlockFormat,
    ChannelBlock,
    Format,
    PairFormat,
    Segment,
    SegmentedFormat,
    VectorBlock,
    format_name,
)
from microscale.formats.segmented import RECORDS
from microscale.layouts import find_layout, matrix_shape, slicing
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.layouts.row_major import own_lengths
from microscale.layouts.segments import name_parts, shapes, split_parts
from microscale.layouts.slicing import Axis


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A tensor of ``shape`` in ``format``; ``parts`` are those of ``layout`` (:data:`microscale.layouts.LAYOUTS`).

    ``dtype`` is the float type that the tensor had and that ``dequantize`` returns by default. A sparse table and the
    streams of a pair may have other lengths than the share that the format names: those of a piece.

    Raises:
        ShapeError: a part is missing, unknown or of another shape than format and shape ask for.
        DtypeError: a part of another dtype.
        LayoutError: an unknown layout, or one that has no place for the format.
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Mapping[str, Tensor]
    layout: str = ROW_MAJOR

    def __post_init__(self) -> None:
        self._check_kinds()
        specs = find_layout(self.layout).part_specs(self.format, self.shape)
        specs.update(own_lengths(self.format, self.shape, self.parts))
        if set(specs) != set(self.parts):
            raise ShapeError(f"{format_name(self.format)} has the parts {sorted(specs)}, got {sorted(self.parts)}")
        for name, spec in specs.items():
            part = self.parts[name]
            if tuple(part.shape) != spec.shape:
                raise ShapeError(
                    f"part {name!r} of a {format_name(self.format)} tensor of shape {list(self.shape)} must have"
                    f" shape {list(spec.shape)}, got {list(part.shape)}"
                )
            if part.dtype != spec.dtype:
                raise DtypeError(f"part {name!r} of {format_name(self.format)} must be {spec.dtype}, got {part.dtype}")

    def _check_kinds(self) -> None:
        check_kind(self.format, RECORDS, "the format of a quantized tensor", "a format record", error=FormatError)
        check_kind(self.shape, tuple, "the shape of a quantized tensor", "a tuple of whole numbers")
        for length in self.shape:
            check_kind(length, (int, torch.SymInt), "each length in the shape of a quantized tensor", "a whole number")
        check_kind(self.dtype, torch.dtype, "the dtype of a quantized tensor", "a dtype of torch")
        check_kind(self.parts, Mapping, "the parts of a quantized tensor", "a mapping of tensors by name")
        for name, part in self.parts.items():
            check_kind(part, Tensor, f"part {name!r} of a quantized tensor", "a tensor")

    @property
    def rows(self) -> int:
        """Product of all axes but the last."""
        return matrix_shape(self.shape)[0]

    @property
    def cols(self) -> int:
        """Length of the last axis, along which blocks run."""
        return matrix_shape(self.shape)[1]

    @property
    def device(self) -> torch.device:
        """Device of the parts."""
        return next(iter(self.parts.values())).device

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts together: in row_major, what a file holds for this tensor."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """Return the same tensor with all parts on ``device``."""
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError):
            raise ArgumentError(f"a device must be one of torch's, such as 'cuda', got {shown(device)}") from None
        return replace(self, parts={name: part.to(place) for name, part in self.parts.items()})

    @property
    def segments(self) -> tuple[QuantizedTensor, ...]:
        """The segments as tensors that share the parts; a tensor of one format is its only segment."""
        fmt = self.format
        if not isinstance(fmt, SegmentedFormat):
            return (self,)
        pairs = zip(shapes(fmt, self.shape), split_parts(self.parts, fmt), strict=True)
        return tuple(
            QuantizedTensor(format=part, shape=shape, dtype=self.dtype, parts=own, layout=self.layout)
            for (part, shape), own in pairs
        )

    def slice_rows(self, begin: int, end: int) -> QuantizedTensor:
        """Return rows ``begin`` to ``end`` as a matrix [end - begin, cols], bit for bit.

        ``dequantize`` of it gives those rows of the values. Rows are views of the parts where rows stand alone.

        Raises:
            ShapeError: rows that do not exist, none, or a cut inside a tile.
            LayoutError: another layout than row_major.
        """
        return self._slice(Axis.ROWS, begin, end)

    def slice_cols(self, begin: int, end: int) -> QuantizedTensor:
        """Return columns ``begin`` to ``end`` of the last axis, bit for bit; the parts are copies.

        The columns of segments are segments again, so that their format is another one.

        Raises:
            ShapeError: columns that do not exist, none, or a cut inside a block.
            LayoutError: another layout than row_major.
        """
        return self._slice(Axis.COLS, begin, end)

    def _slice(self, axis: Axis, begin: int, end: int) -> QuantizedTensor:
        word, shape = axis.name.lower(), (self.rows, self.cols)
        _require_row_major(self, f"slice_{word}")
        for name, place in (("begin", begin), ("end", end)):
            check_kind(place, Integral, f"{name} of slice_{word}", "a whole number")
        if not 0 <= begin < end <= shape[axis.value]:
            raise ShapeError(
                f"slice_{word} takes 0 <= begin < end <= {shape[axis.value]} of a tensor of shape {list(self.shape)},"
                f" got {begin} to {end}"
            )
        fmt = self.format
        if isinstance(fmt, SegmentedFormat):
            return self._slice_segments(fmt, axis, begin, end)
        problem = slicing.cut_refusal(fmt.block, axis, begin, end, shape[axis.value])
        if problem is not None:
            raise ShapeError(f"slice_{word} of {format_name(fmt)}, {list(self.shape)}: {problem}; got {begin} to {end}")
        parts = slicing.slice_parts(self.parts, fmt, shape, axis, begin, end)
        own = (end - begin, self.cols) if axis is Axis.ROWS else (*self.shape[:-1], end - begin)
        return QuantizedTensor(format=fmt, shape=own, dtype=self.dtype, parts=parts)

    def _slice_segments(self, fmt: SegmentedFormat, axis: Axis, begin: int, end: int) -> QuantizedTensor:
        if axis is Axis.ROWS:
            return join_segments([segment.slice_rows(begin, end) for segment in self.segments], fmt)
        pieces: list[QuantizedTensor] = []
        for segment, (_, at) in zip(self.segments, fmt.places(), strict=True):
            first, last = max(begin, at.start), min(end, at.stop)
            if first < last:
                pieces.append(segment.slice_cols(first - at.start, last - at.start))
        return join_segments(pieces, _segments_of(pieces))

    def select_rows(self, rows: Tensor) -> QuantizedTensor | None:
        """Return the tensor of some rows (an embedding look-up), or None where rows share storage or scales.

        Rows stand alone under blocks along the last axis and per channel, without a sparse table or a pair; the result
        is in row_major. Of a layout with groups of rows, the groups of these rows are unpacked.
        """
        expected = "a tensor of integers with one axis"
        check_kind(rows, Tensor, "what select_rows takes", expected, error=DtypeError)
        if rows.dtype not in (torch.int64, torch.int32) or rows.dim() != 1:
            raise DtypeError(f"select_rows takes {expected}, got {rows.dtype} {list(rows.shape)}")
        fmt = self.format
        if isinstance(fmt, SegmentedFormat):
            chosen = [segment.select_rows(rows) for segment in self.segments]
            found = [segment for segment in chosen if segment is not None]
            return None if len(found) < len(chosen) else join_segments(found, fmt)
        if not isinstance(fmt, BlockFormat) or fmt.sparse is not None:
            return None
        if not isinstance(fmt.block, VectorBlock | ChannelBlock):
            return None
        try:
            if self.layout != ROW_MAJOR:
                return self._select_grouped(rows) if len(self.shape) == 2 else None
            parts = slicing.pick_rows(self.parts, fmt, rows)
        except IndexError:
            edges = f"{int(rows.min())} to {int(rows.max())}"
            raise RowError(f"select_rows takes rows 0 to {self.rows - 1} of this tensor, got {edges}") from None
        return QuantizedTensor(format=fmt, shape=(rows.numel(), self.cols), dtype=self.dtype, parts=parts)

    def _select_grouped(self, rows: Tensor) -> QuantizedTensor | None:
        """Return some rows, in row_major, of a layout whose parts hold groups of rows one after another."""
        layout = find_layout(self.layout)
        if layout.row_group is None:
            return None
        _ = rows.new_zeros(1).expand(self.rows)[rows]  # refuses rows that are none, which the last group may hold
        rows = torch.where(rows < 0, rows + self.rows, rows)
        groups = rows // layout.row_group
        parts = {name: part if layout.is_shared(name) else part[groups] for name, part in self.parts.items()}
        shape = (rows.numel() * layout.row_group, self.cols)
        picked = QuantizedTensor(
            format=self.format, shape=shape, dtype=self.dtype, parts=layout.unpack(parts, self.format, shape)
        )
        places = torch.arange(rows.numel(), device=rows.device) * layout.row_group + rows % layout.row_group
        return picked.select_rows(places)


def join_segments(tensors: Sequence[QuantizedTensor], fmt: SegmentedFormat) -> QuantizedTensor:
    """Return the tensor of which these are the segments, in order; nothing is copied."""
    first = tensors[0]
    parts = name_parts([dict(tensor.parts) for tensor in tensors])
    shape = (*first.shape[:-1], fmt.cols)
    return QuantizedTensor(format=fmt, shape=shape, dtype=first.dtype, parts=parts, layout=first.layout)


def join_rows(tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Return tensors of one format and width under each other as a matrix [rows, cols], bit for bit.

    The parts are copies. ``join_rows`` of all ``slice_rows`` of a matrix gives its bytes back.

    Raises:
        FormatError: different formats, or a scale of the tensor that differs.
        ShapeError: no tensors, different widths, or one before the last that ends inside a tile.
        LayoutError: another layout than row_major.
        DtypeError: something else than quantized tensors, or other float types or devices.
    """
    _check_joined(tensors, Axis.ROWS)
    fmt = tensors[0].format
    if not isinstance(fmt, SegmentedFormat):
        return _join(tensors, fmt, Axis.ROWS)
    return join_segments([join_rows(each) for each in zip(*(tensor.segments for tensor in tensors), strict=True)], fmt)


def join_cols(tensors: Sequence[QuantizedTensor], fmt: SegmentedFormat | None = None) -> QuantizedTensor:
    """Return tensors of one format and height side by side, bit for bit; the parts are copies.

    ``join_cols`` of all ``slice_cols`` of a tensor gives its bytes back. Tensors of segments join segment by segment:
    into the segments of ``fmt`` where it is given, else neighbours of one format become one segment.

    Raises:
        FormatError: different formats, a scale that differs where rows or the tensor share it, or segments other
            than those of ``fmt``.
        ShapeError: no tensors, different rows, or one before the last that ends inside a block.
        LayoutError: another layout than row_major.
        DtypeError: something else than quantized tensors, or other float types or devices.
    """
    _check_joined(tensors, Axis.COLS)
    check_kind(fmt, (SegmentedFormat, type(None)), "the format of join_cols", "a SegmentedFormat or None")
    first = tensors[0].format
    if not isinstance(first, SegmentedFormat):
        return _join(tensors, first, Axis.COLS)
    pieces = [segment for tensor in tensors for segment in tensor.segments]
    wanted = fmt or _merged(pieces)
    segments: list[QuantizedTensor] = []
    for segment in wanted.segments:
        own: list[QuantizedTensor] = []
        while pieces and sum(piece.cols for piece in own) < segment.cols:
            own.append(pieces.pop(0))
        is_whole = sum(piece.cols for piece in own) == segment.cols
        if not is_whole or any(piece.format != segment.format for piece in own):
            raise FormatError(
                f"join_cols cannot make {format_name(wanted)} of {[format_name(tensor.format) for tensor in tensors]};"
                " name the segments that these are pieces of"
            )
        segments.append(join_cols(own))
    if pieces:
        raise FormatError(f"{format_name(wanted)} has {wanted.cols} columns, got {sum(t.cols for t in tensors)}")
    return join_segments(segments, wanted)


def _segments_of(pieces: Sequence[QuantizedTensor]) -> SegmentedFormat:
    segments: list[Segment] = []
    for piece in pieces:
        assert isinstance(piece.format, BlockFormat)
        segments.append(Segment(format=piece.format, cols=piece.cols))
    return SegmentedFormat(segments=tuple(segments))


def _merged(pieces: Sequence[QuantizedTensor]) -> SegmentedFormat:
    """Return the format in which neighbours of one format are one segment."""
    merged: list[Segment] = []
    for segment in _segments_of(pieces).segments:
        if merged and merged[-1].format == segment.format:
            segment = Segment(format=segment.format, cols=merged.pop().cols + segment.cols)
        merged.append(segment)
    return SegmentedFormat(segments=tuple(merged))


def _join(tensors: Sequence[QuantizedTensor], fmt: BlockFormat | PairFormat, axis: Axis) -> QuantizedTensor:
    sizes = [(tensor.rows, tensor.cols) for tensor in tensors]
    for size in sizes[:-1]:
        problem = slicing.cut_refusal(fmt.block, axis, 0, size[axis.value], -1)
        if problem is not None:
            raise ShapeError(
                f"join_{axis.name.lower()} of {format_name(fmt)}: {problem}; got {list(size)} before the last tensor"
            )
    parts = slicing.join_parts([tensor.parts for tensor in tensors], fmt, sizes, axis)
    length = sum(size[axis.value] for size in sizes)
    shape = (length, sizes[0][1]) if axis is Axis.ROWS else (*tensors[0].shape[:-1], length)
    return QuantizedTensor(format=fmt, shape=shape, dtype=tensors[0].dtype, parts=parts)


def _check_joined(given: object, axis: Axis) -> None:
    name = f"join_{axis.name.lower()}"
    pieces = cast("Sequence[object]", given) if isinstance(given, Sequence) else (given,)
    tensors = [piece for piece in pieces if isinstance(piece, QuantizedTensor)]
    if given is not pieces or len(tensors) < len(pieces):
        kinds = [type(piece).__name__ for piece in pieces] if given is pieces else type(given).__name__
        raise DtypeError(f"{name} takes a list of quantized tensors, got {kinds}; quantize them first")
    if not tensors:
        raise ShapeError(f"{name} takes at least one tensor, got none")
    for tensor in tensors:
        _require_row_major(tensor, name)
    first = tensors[0]
    for tensor in tensors[1:]:
        is_other = isinstance(tensor.format, SegmentedFormat) != isinstance(first.format, SegmentedFormat)
        is_exact = axis is Axis.ROWS or not isinstance(first.format, SegmentedFormat)
        if is_other or (is_exact and tensor.format != first.format):
            raise FormatError(
                f"{name} takes tensors of one format, got {format_name(first.format)} and"
                f" {format_name(tensor.format)}; different formats side by side are segments (join_segments)"
            )
        kept, other = (each.cols if axis is Axis.ROWS else each.shape[:-1] for each in (first, tensor))
        if kept != other:
            raise ShapeError(
                f"{name} takes tensors that fit together, got {list(first.shape)} and {list(tensor.shape)}"
            )
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise DtypeError(
                f"{name} takes tensors of one float type on one device, got {first.dtype} on {first.device} and"
                f" {tensor.dtype} on {tensor.device}"
            )


def _require_row_major(tensor: QuantizedTensor, name: str) -> None:
    if tensor.layout != ROW_MAJOR:
        raise LayoutError(
            f"{name} works in the layout {ROW_MAJOR}, got a tensor laid out as {tensor.layout};"
            f" lay it out as {ROW_MAJOR} first (kernels.to_layout)"
        )
