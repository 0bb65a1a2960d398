"""A histogram of magnitudes with a fixed set of bins: exact to merge, and good for percentiles of any range.

The bin of a number is the upper part of its float32 bit pattern: exponent and the first ``FRACTION_BITS`` bits of
the fraction. So every octave has 32 bins of equal width, no range has to be known beforehand, and histograms of
different batches add up. A percentile is interpolated inside its bin, hence wrong by less than 1/32 of itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.errors import CalibrationError

FRACTION_BITS = 5
NUM_BINS = 255 << FRACTION_BITS
"""All exponents of finite float32 numbers; the first 32 bins hold zero and the subnormal numbers."""
_SHIFT = 23 - FRACTION_BITS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HistogramSketch:
    """How many magnitudes fell into each bin, and the exact largest one."""

    counts: Int[Tensor, "bins"]
    maximum: float

    @staticmethod
    def empty(device: torch.device | str | None = None) -> HistogramSketch:
        """Return a histogram of no numbers."""
        return HistogramSketch(counts=torch.zeros(NUM_BINS, dtype=torch.int64, device=device), maximum=0.0)

    @staticmethod
    def of(values: Float[Tensor, "..."]) -> HistogramSketch:
        """Count the magnitudes of a tensor, which must be finite in float32."""
        magnitudes = values.detach().to(torch.float32).abs().flatten()
        if magnitudes.numel() == 0:
            return HistogramSketch.empty(values.device)
        bins = magnitudes.view(torch.int32) >> _SHIFT
        counts = torch.bincount(bins, minlength=NUM_BINS)
        return HistogramSketch(counts=counts, maximum=float(magnitudes.amax()))

    def merge(self, other: HistogramSketch) -> HistogramSketch:
        """Return the histogram of the numbers of both."""
        counts = self.counts + other.counts.to(self.counts.device)
        return HistogramSketch(counts=counts, maximum=max(self.maximum, other.maximum))

    def percentile(self, percent: float) -> float:
        """Return the magnitude that ``percent`` of the numbers do not exceed.

        Special values: 100 gives the exact largest number, no numbers give 0.

        Raises:
            CalibrationError: not between 0 and 100.
        """
        if not 0 <= percent <= 100:
            raise CalibrationError(f"a percentile lies between 0 and 100, got {percent}")
        cumulative = self.counts.cumsum(0).cpu()
        total = int(cumulative[-1])
        if total == 0 or percent == 100:
            return self.maximum
        rank = percent / 100 * total
        index = int(torch.searchsorted(cumulative, max(1, math.ceil(rank))))
        inside = int(self.counts[index])
        edges = bin_edges()
        low, high = float(edges[index]), float(edges[index + 1])
        fraction = (rank - (int(cumulative[index]) - inside)) / inside
        return min(low + fraction * (high - low), self.maximum)


def bin_edges() -> Float[Tensor, "edges"]:
    """Return the edges of the bins in float64: ``NUM_BINS + 1`` numbers from 0 to 2^128."""
    patterns = torch.arange(NUM_BINS, dtype=torch.int32) << _SHIFT
    edges = patterns.view(torch.float32).to(torch.float64)
    return torch.cat([edges, torch.tensor([2.0**128], dtype=torch.float64)])
