"""QuantizedTensor: the packed parts of one tensor with format, layout and shape; frozen, no maths.

Its bytes are what a checkpoint of ours holds. Kernels make it (``quantize``) and read it (``dequantize``,
``linear``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from microscale.errors import DtypeError, ShapeError
from microscale.formats import BlockFormat, ChannelBlock, Format, SegmentedFormat, VectorBlock, format_name
from microscale.layouts import find_layout, matrix_shape
from microscale.layouts.row_major import NAME as ROW_MAJOR
from microscale.layouts.segments import join_parts, shapes, split_parts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedTensor:
    """A tensor of ``shape`` in ``format``; ``parts`` are those of ``layout`` (:data:`microscale.layouts.LAYOUTS`).

    ``dtype`` is the float type that the tensor had and that ``dequantize`` returns by default.

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
        specs = find_layout(self.layout).part_specs(self.format, self.shape)
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
        parts = {name: part.to(device) for name, part in self.parts.items()}
        return QuantizedTensor(format=self.format, shape=self.shape, dtype=self.dtype, parts=parts, layout=self.layout)

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

    def select_rows(self, rows: Tensor) -> QuantizedTensor | None:
        """Return the tensor of some rows (an embedding look-up), or None where rows share storage or scales.

        Rows stand alone in row_major under blocks along the last axis and per channel, without a sparse table or a
        pair.
        """
        fmt = self.format
        if self.layout != ROW_MAJOR:
            return None
        if isinstance(fmt, SegmentedFormat):
            chosen = [segment.select_rows(rows) for segment in self.segments]
            found = [segment for segment in chosen if segment is not None]
            return None if len(found) < len(chosen) else join_segments(found, fmt)
        if not isinstance(fmt, BlockFormat) or fmt.sparse is not None:
            return None
        if not isinstance(fmt.block, VectorBlock | ChannelBlock):
            return None
        parts = {name: part if name == "tensor_inv_scale" else part[rows] for name, part in self.parts.items()}
        return QuantizedTensor(
            format=fmt, shape=(rows.numel(), self.cols), dtype=self.dtype, parts=parts, layout=self.layout
        )


def join_segments(tensors: Sequence[QuantizedTensor], fmt: SegmentedFormat) -> QuantizedTensor:
    """Return the tensor of which these are the segments, in order; nothing is copied."""
    first = tensors[0]
    parts = join_parts([dict(tensor.parts) for tensor in tensors])
    shape = (*first.shape[:-1], fmt.cols)
    return QuantizedTensor(format=fmt, shape=shape, dtype=first.dtype, parts=parts, layout=first.layout)
