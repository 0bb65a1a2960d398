"""What the numbers of one tensor look like: moments, percentiles, outlier channels, block crest factors, a histogram.

An *outlier channel* is one whose root mean square is ``OUTLIER_RATIO`` times the median channel's. A *massive* value is
one whose magnitude is ``MASSIVE_RATIO`` times the median magnitude of the tensor (Sun et al., arXiv:2402.17762, who
ask for a magnitude of 100 besides; models differ in scale, so that is left out here).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration.statistics import InputStatistics, StatisticsCollector, Wanted

OUTLIER_RATIO = 5.0
MASSIVE_RATIO = 1000.0
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99, 100.0)
NUM_BINS = 81
NUM_BUCKETS = 192
SAMPLE_ROWS = 256
PIECE_VALUES = 1 << 17
"""Values that are at hand in float64 at a time, of which moments need three copies."""
MOST_PLACES = 256
"""Places of large values that are kept while more come."""
WANTED = Wanted.MOMENTS | Wanted.CREST | Wanted.HISTOGRAM | Wanted.SAMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class MassiveValue:
    """One of the largest values of a tensor: its row (a token's place in its window, a weight's output) and channel.

    ``window`` is the first window that holds the largest value of this place, and ``windows`` the number of windows
    where the place is among the largest; None and 1 where rows are not the tokens of a window (weights, tokens routed
    to an expert).
    """

    row: int
    channel: int
    value: float
    window: int | None
    windows: int


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


def pieces_of(rows: Float[Tensor, "rows cols"]) -> Iterator[tuple[int, Float[Tensor, "n cols"]]]:
    """Yield the rows in pieces of at most ``PIECE_VALUES`` values (but one row at least), each with its first place."""
    step = max(1, PIECE_VALUES // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield start, rows[start : start + step]


def noise_and_power(values: Float[Tensor, "rows cols"], rounded: Float[Tensor, "rows cols"]) -> tuple[float, float]:
    """Return Σ (x' - x)² and Σ x², summed in float64, without a copy of the whole in it."""
    noise = power = 0.0
    for (_, exact), (_, seen) in zip(pieces_of(values), pieces_of(rounded), strict=True):
        noise += float((seen.to(torch.float32) - exact).square_().sum(dtype=torch.float64))
        power += float(exact.square().sum(dtype=torch.float64))
    return noise, power


class LargestValues:
    """The values of largest magnitude seen so far, each place (row, channel) once, with how many windows have it."""

    def __init__(self, count: int = 5) -> None:
        self.count = count
        self._windows_seen = 0
        self._found: dict[tuple[int, int], MassiveValue] = {}

    @property
    def values(self) -> list[MassiveValue]:
        """The largest ones, in order of magnitude."""
        return sorted(self._found.values(), key=lambda one: -abs(one.value))[: self.count]

    def update(self, rows: Float[Tensor, "... cols"], first: int = 0) -> None:
        """Take in values: windows [windows, tokens, cols], or rows that are counted from ``first``.

        Values with more axes (norms of heads) have no place in a window and are left out.
        """
        if rows.ndim == 3:
            for window in rows:
                self._take(window, 0, self._windows_seen)
                self._windows_seen += 1
        elif rows.ndim < 3:
            self._take(rows, first, None)
        if len(self._found) > MOST_PLACES:
            kept = sorted(self._found.items(), key=lambda item: -abs(item[1].value))[: MOST_PLACES // 2]
            self._found = dict(kept)

    def _take(self, rows: Tensor, first: int, window: int | None) -> None:
        width = rows.shape[-1]
        for start, flat in pieces_of(rows.detach().reshape(-1, width)):
            self._take_piece(flat.flatten(), width, first + start, window)

    def _take_piece(self, flat: Tensor, width: int, first: int, window: int | None) -> None:
        _, places = flat.abs().topk(min(self.count, flat.numel()))
        for place in places.tolist():
            row, channel, value = first + place // width, place % width, float(flat[place])
            known = self._found.get((row, channel))
            times = 1 if known is None or window is None else known.windows + 1
            if known is not None and abs(known.value) >= abs(value):
                self._found[row, channel] = replace(known, windows=times)
            else:
                self._found[row, channel] = MassiveValue(
                    row=row, channel=channel, value=value, window=window, windows=times
                )


class TensorObserver:
    """Collects what :class:`TensorFacts` needs, call by call, on the device of the values."""

    def __init__(self, cols: int, name: str, device: torch.device | str = "cpu") -> None:
        self._collector = StatisticsCollector(cols, wanted=WANTED, sample_rows=SAMPLE_ROWS, name=name, device=device)
        self._largest = LargestValues()

    def update(self, rows: Float[Tensor, "... cols"], first: int = 0) -> None:
        """Take in values, as :meth:`LargestValues.update` reads them.

        Raises:
            NonFiniteError: NaN or Inf, with the name.
        """
        self._largest.update(rows, first)
        for _, piece in pieces_of(rows.detach().reshape(-1, rows.shape[-1])):
            self._collector.update(piece)

    @property
    def is_empty(self) -> bool:
        """Whether nothing came."""
        return not self._collector.num_tokens

    def facts(self) -> TensorFacts:
        """Return the facts; all are 0 where nothing came."""
        return tensor_facts(self._collector.result(), self._largest)

    def sample(self) -> Float[Tensor, "n cols"]:
        """Return at most ``SAMPLE_ROWS`` evenly chosen rows in float32."""
        return self._collector.result().require("sample").to(torch.float32)


def weight_facts(weight: Float[Tensor, "..."], name: str) -> TensorFacts:
    """Return the facts of a weight in any float type, its input channels as channels.

    Raises:
        NonFiniteError: NaN or Inf, with the name.
    """
    rows = weight if weight.ndim == 2 else weight.reshape(1, -1)
    observer = TensorObserver(rows.shape[1], name, rows.device)
    for start, piece in pieces_of(rows):
        observer.update(piece, start)
    return observer.facts()


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
