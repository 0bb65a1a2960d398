"""Entropy calibration: the clipping range whose rounded histogram tells least less than the true one.

Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017. There, candidates keep the first i of 2048 bins, clipped
numbers count into the last of them, and 128 equal levels stand for the rounded numbers. Here the levels are those of
the format at hand, found by rounding the centres of the bins; a range must end at a bin that is not empty, for clipped
numbers in an empty one would count as infinitely far off, and must have fewer levels than bins, or no rounding would be
seen. Left out, as there: numbers that are exactly zero, which every format holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from microscale.errors import CalibrationError

NUM_BINS = 4096
"""At least half of them are in use, for the range is the next power of two above the largest number."""
_OCTAVES, _PER_OCTAVE = 6, 24
"""Ranges are tried down to 1/64 of the largest number, in even ratios."""


class LinearHistogram:
    """Bins of equal width from 0 to a power of two; when a larger number comes, pairs of bins are joined.

    So the counts depend on the numbers alone, not on their order or batches.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_BINS, dtype=torch.int64)
        self.exponent: int | None = None

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 0.0 if self.exponent is None else 2.0**self.exponent / NUM_BINS

    def update(self, values: Float[Tensor, "..."]) -> None:
        """Count the magnitudes of finite values but for zeros."""
        magnitudes = values.to(torch.float64).abs().flatten()
        magnitudes = magnitudes[magnitudes > 0]
        if not magnitudes.numel():
            return
        exponent = math.frexp(float(magnitudes.amax()))[1]  # 2^(exponent - 1) <= largest < 2^exponent
        self._widen(exponent)
        bins = (magnitudes / self.width).to(torch.int64)
        self.counts += torch.bincount(bins, minlength=NUM_BINS).cpu()

    def _widen(self, exponent: int) -> None:
        before = exponent if self.exponent is None else self.exponent
        for _ in range(min(exponent - before, NUM_BINS.bit_length())):
            joined = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.cat([joined, torch.zeros_like(joined)])
        self.exponent = max(before, exponent)


def entropy_threshold(
    counts: Int[Tensor, "bins"],
    width: float,
    quantize: Callable[[Float[Tensor, "1 bins"], Float[Tensor, "1"]], Float[Tensor, "1 bins"]],
) -> float:
    """Return the upper edge of the bins to keep; of equal divergences the larger range wins.

    ``quantize`` rounds numbers with a given amax, each by itself.

    Raises:
        CalibrationError: no counts.
    """
    if not int(counts.sum()):
        raise CalibrationError("a range by entropy needs numbers that are not zero")
    filled = counts.nonzero().flatten() + 1
    used = int(filled[-1])
    centres = (torch.arange(used, dtype=torch.float64) + 0.5) * width
    best, least = used, math.inf
    for stop in _candidates(filled):
        rounded = quantize(centres[:stop].to(torch.float32)[None], torch.tensor([stop * width], dtype=torch.float32))
        levels, groups = torch.unique(rounded[0], return_inverse=True)
        if levels.numel() == stop:
            continue
        divergence = clipped_divergence(counts, groups.cpu())
        if divergence < least:
            best, least = stop, divergence
    return best * width


def _candidates(filled: Int[Tensor, "filled"]) -> list[int]:
    """Return numbers of bins to keep, falling; each ends at one of the ``filled`` ends of bins."""
    used = int(filled[-1])
    wanted = [used * 2.0 ** (-step / _PER_OCTAVE) for step in range(_OCTAVES * _PER_OCTAVE + 1)]
    places = torch.searchsorted(filled, torch.tensor(wanted).round().to(torch.int64), right=True) - 1
    return sorted({int(filled[place]) for place in places if place >= 0}, reverse=True)


def clipped_divergence(counts: Int[Tensor, "bins"], groups: Int[Tensor, "kept"]) -> float:
    """Return KL(P || Q) in nats of keeping the first ``len(groups)`` bins, bins of one group rounded to one level.

    P is the histogram with all clipped numbers in the last bin that is kept. Q shares the numbers of each group, the
    clipped ones left out, evenly among the group's bins that are not empty. Inf where P has numbers and Q has none.
    """
    stop = groups.shape[0]
    kept = counts[:stop].to(torch.float64)
    true = kept.clone()
    true[-1] += float(counts[stop:].sum())
    is_used = kept > 0
    size = int(groups.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, kept)
    members = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, is_used.to(torch.float64))
    rounded = torch.where(is_used, (total / members.clamp(min=1))[groups], 0.0)
    if not float(rounded.sum()):
        return math.inf
    p, q = true / true.sum(), rounded / rounded.sum()
    if bool(((p > 0) & (q == 0)).any()):
        return math.inf
    inside = p > 0
    return float((p[inside] * (p[inside] / q[inside]).log()).sum())
