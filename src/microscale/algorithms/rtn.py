"""Round-to-nearest: every block on its own, no calibration. The baseline of every other method.

With ``search`` the range of each block is shrunk by each of a few factors, and the one with the least squared error is
kept: per-block exponent search where the scale is a power of two. With ``weighted`` the errors of a column count by the
mean square of its input, the diagonal of the Hessian of the layer's output error.

Source: OCP MX v1.0 section 6.3 (the conversion that the specification asks for); the search is that of the
scale-multiplier grid in AutoRound's documentation ("opt-RTN").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import LayerProblem, RoundStep, clipped
from microscale.calibration.statistics import Wanted
from microscale.formats import ActivationSpec, BlockFormat, ChannelBlock, Format, SegmentedFormat, VectorBlock
from microscale.kernels import dequantize, quantize
from microscale.kernels.grid import make_grid
from microscale.tensor import QuantizedTensor

SHRINK_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Ranges that the search tries, as a share of a block's own."""


def block_width(fmt: Format, cols: int) -> int | None:
    """Return how many consecutive columns of a row share a scale; None where a block is no part of a row, or not all of
    a row's blocks are equal.
    """
    if isinstance(fmt, SegmentedFormat):
        widths = {block_width(part, at.stop - at.start) for part, at in fmt.places()}
        width = widths.pop()
        is_even = width is not None and not widths and all(at.start % width == 0 for _, at in fmt.places())
        return width if is_even else None
    if isinstance(fmt, BlockFormat) and isinstance(fmt.block, VectorBlock):
        return fmt.block.size
    if isinstance(fmt, BlockFormat) and isinstance(fmt.block, ChannelBlock):
        return cols
    return None


def block_amax(values: Float[Tensor, "rows cols"], width: int) -> Float[Tensor, "rows cols"]:
    """Return each element's block maximum of |x|; a ragged last block is a block too."""
    cols = values.shape[1]
    padded = torch.nn.functional.pad(values.abs(), (0, -cols % width))
    return padded.unflatten(1, (-1, width)).amax(-1).repeat_interleave(width, 1)[:, :cols]


def idle_search(fmt: Format) -> str | None:
    """Return why :func:`search_clip` finds nothing in a format, or None."""
    if isinstance(fmt, SegmentedFormat):
        return None  # known only once there are columns
    is_searched = block_width(fmt, 1) is not None
    return None if is_searched else "its search needs blocks of one scale each, along the rows"


def search_clip(
    weight: Float[Tensor, "rows cols"],
    fmt: Format,
    column_weights: Float[Tensor, "cols"] | None,
    factors: tuple[float, ...] = SHRINK_FACTORS,
) -> Float[Tensor, "rows cols"] | None:
    """Return the bound of every element's block with the least (weighted) squared error; None where there are no rows
    of blocks to search in.

    Formula: of clip = f * max |w|, the f of the list (the largest of equal ones) that minimizes
    sum_i c_i (quantize(clamp(w, clip))_i - w_i)^2 over the block, c the column weights.
    """
    width = block_width(fmt, weight.shape[1])
    if width is None:
        return None
    amax = block_amax(weight, width)
    best, best_error = amax, torch.full_like(weight, torch.inf)
    for factor in factors:
        limit = amax * factor
        error = (dequantize(quantize(torch.clamp(weight, -limit, limit), fmt)) - weight).square()
        if column_weights is not None:
            error = error * column_weights
        total = block_sum(error, width)
        is_better = total < best_error
        best, best_error = torch.where(is_better, limit, best), torch.where(is_better, total, best_error)
    return best


def block_sum(values: Float[Tensor, "rows cols"], width: int) -> Float[Tensor, "rows cols"]:
    """Return each element's block sum."""
    cols = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, -cols % width))
    return padded.unflatten(1, (-1, width)).sum(-1).repeat_interleave(width, 1)[:, :cols]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn(RoundStep):
    """Round to nearest; ``search`` shrinks the range of each block where that helps, ``weighted`` by the Hessian."""

    name: ClassVar[str] = "rtn"
    source: ClassVar[str] = "OCP MX v1.0 section 6.3"

    search: bool = False
    weighted: bool = False

    @property
    def wanted(self) -> Wanted | None:
        """The second moment, for weighted errors."""
        return Wanted.SECOND_MOMENT if self.weighted else None

    def idleness(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Say where a search finds no rows of blocks to search in."""
        return idle_search(fmt) if self.search or self.weighted else None

    def quantize(self, layer: LayerProblem) -> QuantizedTensor:
        """Quantize with the format's own rule, from the clipped weight where there is a clip.

        A weight whose rounding was tuned (``offset``) has its scales already: no search changes them. One that was
        expanded from this very format keeps its codes and scales: other scales may mean the same numbers.

        Raises:
            NonFiniteError: see :func:`microscale.kernels.ops.quantize`.
        """
        if layer.stored is not None and self == Rtn() and _is_meant(layer.stored, layer):
            return replace(layer.stored.to(layer.weight.device), dtype=layer.dtype)
        target = layer.target
        weight = clipped(target, layer)
        if layer.offset is not None:
            return make_grid(weight, layer.format, dtype=layer.dtype).tensor(target + layer.offset)
        if self.search or self.weighted:
            moment = layer.second_moment
            columns = moment.diagonal() if self.weighted and moment is not None else None
            clip = search_clip(weight, layer.format, columns)
            weight = weight if clip is None else torch.clamp(weight, -clip, clip)
        tensor = quantize(weight, layer.format, name=f"{layer.name}.weight")
        return replace(tensor, dtype=layer.dtype)


def _is_meant(stored: QuantizedTensor, layer: LayerProblem) -> bool:
    """Whether a packed weight has the format of a layer and means what must be rounded there, as it stands."""
    if stored.format != layer.format or layer.clip is not None or layer.offset is not None:
        return False
    values = dequantize(stored).to(layer.dtype)
    return torch.equal(values.to(device=layer.weight.device, dtype=layer.weight.dtype), layer.target)
