"""What the numbers of one tensor look like: moments, percentiles, outlier channels, block crest factors, a histogram.

An *outlier channel* is one whose root mean square is ``OUTLIER_RATIO`` times the median channel's. A *massive* value is
one whose magnitude is ``MASSIVE_RATIO`` times the median magnitude of the tensor (Sun et al., arXiv:2402.17762, who
ask for a magnitude of 100 besides; models differ in scale, so that is left out here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration import InputStatistics, StatisticsCollector, Wanted

OUTLIER_RATIO = 5.0
MASSIVE_RATIO = 1000.0
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99, 100.0)
NUM_BINS = 81
NUM_BUCKETS = 192
SAMPLE_ROWS = 256
PIECE_ROWS = 512
"""Rows of a weight that are at hand in float64 at a time."""
WANTED = Wanted.MOMENTS | Wanted.CREST | Wanted.HISTOGRAM | Wanted.SAMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class MassiveValue:
    """One of the largest values of a tensor: row (a token's place in its window, a weight's output), channel, value."""

    row: int
    channel: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """The numbers of a tensor [rows, channels].

    ``percentiles`` are of magnitudes. ``crest_mean`` and ``crest_max`` are max |x| / rms of blocks of 32 channels.
    ``channels`` is the largest magnitude of each of at most 192 runs of channels, in order. ``histogram`` counts
    x / (largest magnitude of its block), as a share of all, in equal bins from -1 to 1. ``massive`` is empty where
    there are no such values, and holds at most five.
    """

    rows: int
    num_channels: int
    minimum: float
    maximum: float
    mean: float
    std: float
    skewness: float
    kurtosis: float
    percentiles: Mapping[float, float]
    crest_mean: float
    crest_max: float
    outlier_channels: tuple[int, ...]
    outlier_ratio: float
    massive: tuple[MassiveValue, ...]
    channels: tuple[float, ...]
    histogram: tuple[float, ...]


class LargestValues:
    """The values of largest magnitude seen so far, with their places."""

    def __init__(self, count: int = 5) -> None:
        self.count = count
        self.values: list[MassiveValue] = []

    def update(self, rows: Float[Tensor, "... tokens cols"], first: int = 0) -> None:
        """Take in values; the last axis but one gives the row's place, counted from ``first``."""
        flat = rows.detach().flatten()
        if not flat.numel():
            return
        width, length = rows.shape[-1], rows.shape[-2] if rows.ndim > 1 else 1
        _, places = flat.abs().topk(min(self.count, flat.numel()))
        for place in places.tolist():
            row = first + (place // width) % length
            self.values.append(MassiveValue(row=row, channel=place % width, value=float(flat[place])))
        self.values = sorted(self.values, key=lambda one: -abs(one.value))[: self.count]


def weight_facts(weight: Float[Tensor, "rows cols"], name: str) -> TensorFacts:
    """Return the facts of a weight, its input channels as channels.

    Raises:
        NonFiniteError: NaN or Inf, with the name.
    """
    rows = weight if weight.ndim == 2 else weight.reshape(1, -1)
    collector = StatisticsCollector(rows.shape[1], wanted=WANTED, sample_rows=SAMPLE_ROWS, name=name)
    largest = LargestValues()
    for start in range(0, rows.shape[0], PIECE_ROWS):
        piece = rows[start : start + PIECE_ROWS]
        collector.update(piece)
        largest.update(piece, start)
    return tensor_facts(collector.result(), largest)


def tensor_facts(found: InputStatistics, largest: LargestValues) -> TensorFacts:
    """Return the facts that statistics of channels give for the tensor; without any row everything is 0."""
    mean, std, skewness, kurtosis = pooled_moments(found)
    assert found.histogram is not None
    percentiles = {percent: found.histogram.percentile(percent) for percent in PERCENTILES}
    sizes = (found.require("std").square() + found.require("mean").square()).sqrt()
    median = float(sizes.median()) if sizes.numel() else 0.0
    outliers = (sizes >= OUTLIER_RATIO * median).nonzero().flatten().tolist() if median > 0 else []
    bar = MASSIVE_RATIO * percentiles[50.0]
    return TensorFacts(
        rows=found.num_tokens,
        num_channels=found.cols,
        minimum=float(found.minimum.min()),
        maximum=float(found.maximum.max()),
        mean=mean,
        std=std,
        skewness=skewness,
        kurtosis=kurtosis,
        percentiles=percentiles,
        crest_mean=float(found.require("crest_mean").mean()),
        crest_max=float(found.require("crest_max").max()),
        outlier_channels=tuple(outliers),
        outlier_ratio=float(sizes.max()) / median if median > 0 else 0.0,
        massive=tuple(one for one in largest.values if bar > 0 and abs(one.value) >= bar),
        channels=_runs(found.amax),
        histogram=_histogram(found.require("sample"), found.block_size),
    )


def pooled_moments(found: InputStatistics) -> tuple[float, float, float, float]:
    """Return mean, standard deviation, skewness and kurtosis of all numbers, from those of the channels.

    Special values: a constant tensor has skewness and kurtosis 0.
    """
    names = ("mean", "std", "skewness", "kurtosis")
    centre, std, skewness, kurtosis = (found.require(name).to(torch.float64) for name in names)
    variance = std.square()
    third, fourth = skewness * std**3, kurtosis * variance.square()
    mean = centre.mean()
    shift = centre - mean
    m2 = (variance + shift**2).mean()
    m3 = (third + 3 * shift * variance + shift**3).mean()
    m4 = (fourth + 4 * shift * third + 6 * shift**2 * variance + shift**4).mean()
    if not float(m2) > 0:
        return float(mean), 0.0, 0.0, 0.0
    return float(mean), float(m2.sqrt()), float(m3 / m2**1.5), float(m4 / m2**2)


def _runs(amax: Float[Tensor, "cols"]) -> tuple[float, ...]:
    """Return the largest magnitude of at most ``NUM_BUCKETS`` runs of channels."""
    step = -(-amax.numel() // NUM_BUCKETS)
    return tuple(float(piece.max()) for piece in amax.split(step))


def _histogram(sample: Float[Tensor, "rows cols"], block: int) -> tuple[float, ...]:
    """Return the shares of values by their part of the block's largest magnitude; blocks of zeros are left out."""
    rows = sample.to(torch.float32)
    width = rows.shape[-1] - rows.shape[-1] % block
    if not rows.numel():
        return (0.0,) * NUM_BINS
    blocks = rows[:, :width].reshape(-1, block) if width else rows
    largest = blocks.abs().amax(-1, keepdim=True)
    parts = (blocks / largest.clamp(min=1e-38))[largest.squeeze(-1) > 0]
    counts = torch.histc(parts, bins=NUM_BINS, min=-1.0, max=1.0)
    return tuple((counts / counts.sum().clamp(min=1)).tolist())
