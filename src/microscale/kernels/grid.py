"""ElementGrid: the numbers that each place of a weight can take once the scales of its format are fixed.

Error-feedback methods round one column after the other while the scales stay. The grid knows, for each element, its
factor, its zero point, and whether it is the largest of its block (MX+ and MX++, chosen before any feedback).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from microscale.errors import FormatError, ShapeError, check_kind
from microscale.formats import BlockFormat, Format, Rounding, SegmentedFormat, format_name
from microscale.formats.codec import decode, decode_zero_point, encode, has_largest
from microscale.formats.segmented import RECORDS
from microscale.kernels.checks import check_float
from microscale.kernels.reference.blocking import from_blocks, to_blocks
from microscale.kernels.reference.encode import encode_largest, encode_matrix, float32_values, sub_factor
from microscale.kernels.reference.quantize import pack_encoded
from microscale.kernels.reference.scales import scale_factor
from microscale.kernels.rounding_table import element_table, largest_table
from microscale.tensor import QuantizedTensor, join_segments


def grid_refusal(fmt: Format) -> str | None:
    """Return why a format has no grid of fixed scales, or None."""
    if isinstance(fmt, SegmentedFormat):
        return next((reason for segment in fmt.segments if (reason := grid_refusal(segment.format))), None)
    if not isinstance(fmt, BlockFormat):
        return "a pair of formats chooses one of them by the numbers themselves"
    if fmt.sparse is not None:
        return "a sparse table chooses its elements by the numbers themselves"
    if fmt.rounding is Rounding.STOCHASTIC:
        return "stochastic rounding has no nearest number"
    return None


class Grid(Protocol):
    """What the grids of one format and of segments have in common."""

    def round(self, values: Float[Tensor, "rows n"], columns: slice) -> Float[Tensor, "rows n"]:
        """Return the nearest representable numbers of some columns, in float32."""
        ...

    def gap(self, values: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Return the distance between the two representable numbers around each value, in float32."""
        ...

    def tensor(self, values: Float[Tensor, "rows cols"]) -> QuantizedTensor:
        """Return the quantized tensor with these scales whose elements are the nearest to ``values``."""
        ...


def make_grid(weight: Float[Tensor, "rows cols"], fmt: Format, *, dtype: torch.dtype | None = None) -> Grid:
    """Return the grid of a format, or of segments.

    Raises:
        FormatError: see :func:`grid_refusal`.
        ShapeError: a weight of another width than the segments.
    """
    check_float(weight, "the weight of a grid")
    check_kind(fmt, RECORDS, "the format of a grid", "a format record", error=FormatError)
    if weight.dim() != 2:
        raise ShapeError(f"a grid is of a weight [rows, cols], got {list(weight.shape)}")
    if isinstance(fmt, SegmentedFormat):
        return SegmentedGrid(weight, fmt, dtype=dtype)
    return ElementGrid(weight, fmt, dtype=dtype)


class ElementGrid:
    """Scales of a weight [rows, cols] fixed by its format's rule (or by ``amax``), elements free.

    Raises:
        FormatError: see :func:`grid_refusal`; segments (:func:`make_grid` takes them).
    """

    def __init__(
        self,
        weight: Float[Tensor, "rows cols"],
        fmt: Format,
        *,
        amax: Float[Tensor, "..."] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        problem = grid_refusal(fmt)
        if problem is not None or not isinstance(fmt, BlockFormat):
            raise FormatError(f"{format_name(fmt)} cannot be rounded element by element: {problem}; choose method rtn")
        self.format = fmt
        self.shape = tuple(weight.shape)
        self.dtype = dtype or weight.dtype
        self._encoded = encode_matrix(float32_values(weight, fmt), fmt, amax)
        factor = scale_factor(self._encoded.scale, fmt, self._encoded.tensor_inv_scale).unsqueeze(-1)
        if fmt.has_zero_code:
            factor = torch.where((self._encoded.scale == 0).unsqueeze(-1), 0.0, factor)  # the code of a zero block
        size = self._encoded.codes.shape[-1]
        self._largest_factor = self._expand(factor, size)
        self._factor = self._expand(self._element_factor(factor), size)
        zero = self._encoded.zero_point
        self._zero = None if zero is None else self._expand(decode_zero_point(zero, fmt).unsqueeze(-1), size)
        self._is_largest = self._largest_places(size)

    def _expand(self, blocks: Tensor, size: int) -> Float[Tensor, "rows cols"]:
        return from_blocks(blocks.expand(*blocks.shape[:2], size), self.format.block, *self.shape).contiguous()

    def _element_factor(self, factor: Tensor) -> Tensor:
        encoded, fmt = self._encoded, self.format
        if encoded.sub_scale is not None and fmt.sub_scale is not None:
            return sub_factor(factor, encoded.sub_scale, fmt).repeat_interleave(fmt.sub_scale.size, -1)
        if encoded.delta is not None:
            return factor * torch.pow(2.0, -encoded.delta.to(torch.float32).unsqueeze(-1))
        return factor

    def _largest_places(self, size: int) -> Bool[Tensor, "rows cols"] | None:
        encoded, fmt = self._encoded, self.format
        if not fmt.is_extended or encoded.max_idx is None:
            return None
        places = torch.zeros(*encoded.max_idx.shape, size, dtype=torch.bool, device=encoded.max_idx.device)
        places.scatter_(-1, encoded.max_idx.unsqueeze(-1).to(torch.int64), True)
        if not fmt.has_zero_code:
            places &= has_largest(encoded.scale, fmt).unsqueeze(-1)
        return from_blocks(places, fmt.block, *self.shape)

    def _scaled(self, values: Tensor, columns: slice) -> Tensor:
        scaled = _divided(values, self._factor[:, columns])
        return scaled if self._zero is None else scaled + self._zero[:, columns]

    def _codes(self, values: Tensor) -> Tensor:
        fmt = self.format
        return encode(self._scaled(values, slice(None)), fmt.element, rounding=fmt.rounding, overflow=fmt.overflow)

    def round(self, values: Float[Tensor, "rows n"], columns: slice) -> Float[Tensor, "rows n"]:
        """Return the nearest representable numbers of some columns, in float32.

        Special values: a block whose scale is zero takes zeros; past the largest element saturates.
        """
        fmt, scaled = self.format, self._scaled(values, columns)
        table = element_table(fmt, values.device)
        if table is not None:
            elements = table(scaled)
        else:
            elements = decode(encode(scaled, fmt.element, rounding=fmt.rounding, overflow=fmt.overflow), fmt.element)
        if self._zero is not None:
            elements = elements - self._zero[:, columns]
        rounded = elements * self._factor[:, columns]
        if self._is_largest is None:
            return rounded
        factor = self._largest_factor[:, columns]
        largest = largest_table(fmt, values.device)(_divided(values, factor)) * factor
        return torch.where(self._is_largest[:, columns], largest, rounded)

    def gap(self, values: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Return the distance between the two representable numbers around each value, in float32.

        Special values: 0 past the largest number, in a block whose scale is zero, and for elements of more than 8 bits,
        whose numbers are not listed (nor those of elements that overflow to NaN).
        """
        table = element_table(self.format, values.device)
        if table is None:
            return torch.zeros_like(values)
        numbers, scaled = table.numbers, self._scaled(values, slice(None))
        place = torch.searchsorted(numbers, scaled.contiguous(), right=True).clamp(1, len(numbers) - 1)
        gap = (numbers[place] - numbers[place - 1]) * self._factor
        gap = torch.where((scaled > numbers[-1]) | (scaled < numbers[0]), 0.0, gap)
        if self._is_largest is None:
            return gap
        first, second = self.format.largest_values()[:2]
        return torch.where(self._is_largest, (second - first) * self._largest_factor, gap)

    def tensor(self, values: Float[Tensor, "rows cols"]) -> QuantizedTensor:
        """Return the quantized tensor with these scales whose elements are the nearest to ``values``."""
        codes = self._codes(values)
        if self._is_largest is not None:
            largest = encode_largest(_divided(values, self._largest_factor), self.format)
            codes = torch.where(self._is_largest, largest.to(codes.dtype), codes)
            if self.format.scale.is_power_of_two:
                codes = torch.where(self._largest_factor > 0, codes, torch.zeros_like(codes))
        encoded = dataclasses.replace(self._encoded, codes=self._padded_blocks(codes))
        parts = pack_encoded(encoded, self.format, *self.shape)
        return QuantizedTensor(format=self.format, shape=self.shape, dtype=self.dtype, parts=parts)

    def _padded_blocks(self, codes: Tensor) -> Tensor:
        """Return the codes by blocks; the padding of a ragged end holds what the number 0 is encoded as."""
        blocks = to_blocks(codes, self.format.block)
        zero = self._encoded.zero_point
        if zero is None or blocks.numel() == codes.numel():
            return blocks
        is_real = to_blocks(torch.ones_like(codes, dtype=torch.bool), self.format.block)
        padding = encode(decode_zero_point(zero, self.format), self.format.element).unsqueeze(-1)
        return torch.where(is_real, blocks, padding.to(blocks.dtype))


class SegmentedGrid:
    """The grids of segments, each with its columns."""

    def __init__(
        self, weight: Float[Tensor, "rows cols"], fmt: SegmentedFormat, *, dtype: torch.dtype | None = None
    ) -> None:
        if weight.shape[-1] != fmt.cols:
            raise ShapeError(f"{format_name(fmt)} is for {fmt.cols} columns, but the weight has {weight.shape[-1]}")
        self.format = fmt
        self._grids = [(ElementGrid(weight[:, at], part, dtype=dtype), at) for part, at in fmt.places()]

    def round(self, values: Float[Tensor, "rows n"], columns: slice) -> Float[Tensor, "rows n"]:
        """Return the nearest representable numbers of some columns, in float32."""
        pieces: list[Tensor] = []
        first, last, _ = columns.indices(self.format.cols)
        for grid, at in self._grids:
            start, stop = max(first, at.start), min(last, at.stop)
            if start < stop:
                own = values[:, start - first : stop - first]
                pieces.append(grid.round(own, slice(start - at.start, stop - at.start)))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def gap(self, values: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """Return the distance between the two representable numbers around each value, in float32."""
        return torch.cat([grid.gap(values[:, at]) for grid, at in self._grids], dim=1)

    def tensor(self, values: Float[Tensor, "rows cols"]) -> QuantizedTensor:
        """Return the quantized tensor with these scales whose elements are the nearest to ``values``."""
        return join_segments([grid.tensor(values[:, at]) for grid, at in self._grids], self.format)


def _divided(values: Tensor, factor: Tensor) -> Tensor:
    """Return values / factor, 0 where the factor is 0."""
    is_usable = factor > 0
    return torch.where(is_usable, values / torch.where(is_usable, factor, 1.0), 0.0)
