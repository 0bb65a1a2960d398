"""Statistics of the inputs of one linear layer, collected in one pass over the calibration tokens.

A method says what it wants by a set of :class:`Wanted`; only that is computed. The range of each channel always is,
for the test that inputs are finite gives it for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration.accumulators import Crest, Histogram, MeanAbs, Moments, Reservoir, SecondMoment
from microscale.calibration.histogram import HistogramSketch
from microscale.errors import CalibrationError, DtypeError, NonFiniteError, ShapeError, counted

DEFAULT_SAMPLE_ROWS = 512
DEFAULT_BLOCK_COLS = 256
_CHUNK_VALUES = 1 << 22
"""Values that are at hand in float32 at a time: 16 MiB."""


class Wanted(Flag):
    """Which statistics a method wants besides num_tokens, amax, minimum and maximum."""

    RANGE = 0
    """Nothing more."""
    MEAN_ABS = auto()
    MOMENTS = auto()
    """Mean, standard deviation, skewness, kurtosis."""
    SECOND_MOMENT = auto()
    SAMPLE = auto()
    CREST = auto()
    HISTOGRAM = auto()
    ALL = MEAN_ABS | MOMENTS | SECOND_MOMENT | SAMPLE | CREST | HISTOGRAM


FieldName = Literal[
    "mean_abs", "mean", "std", "skewness", "kurtosis", "second_moment", "sample", "crest_mean", "crest_max"
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputStatistics:
    """What the inputs x of one layer looked like over all tokens; what was not wanted is None.

    ``second_moment`` is the mean of x^T x over the tokens: half of what the GPTQ paper calls the Hessian, exactly
    symmetric. Standard deviation, skewness and kurtosis are those of the population; kurtosis is m4 / m2^2, 3 for a
    normal distribution. ``sample`` holds raw rows in the inputs' dtype, in the order of the text, evenly chosen.
    ``crest_mean`` and ``crest_max`` are max |x| / rms of blocks of ``block_size`` channels for each block position.

    Special values: skewness and kurtosis of a constant channel are 0; a crest factor of a position where all blocks
    were zero is 0. Without any token (an expert that no token chose) everything is 0 and the sample is empty.
    """

    name: str
    num_tokens: int
    block_size: int
    amax: Float[Tensor, "cols"]
    minimum: Float[Tensor, "cols"]
    maximum: Float[Tensor, "cols"]
    mean_abs: Float[Tensor, "cols"] | None = None
    mean: Float[Tensor, "cols"] | None = None
    std: Float[Tensor, "cols"] | None = None
    skewness: Float[Tensor, "cols"] | None = None
    kurtosis: Float[Tensor, "cols"] | None = None
    second_moment: Float[Tensor, "cols cols"] | None = None
    sample: Float[Tensor, "n cols"] | None = None
    crest_mean: Float[Tensor, "blocks"] | None = None
    crest_max: Float[Tensor, "blocks"] | None = None
    histogram: HistogramSketch | None = None

    @property
    def cols(self) -> int:
        """Number of channels."""
        return self.amax.shape[0]

    def require(self, field: FieldName) -> Tensor:
        """Return a statistic that a method cannot do without.

        Raises:
            CalibrationError: it was not collected.
        """
        value: Tensor | None = getattr(self, field)
        if value is None:
            raise CalibrationError(
                f"the statistics of {self.name} lack {field}; collect them with the Wanted flag that gives it"
            )
        return value


class StatisticsCollector:
    """Collects :class:`InputStatistics` batch by batch; see :meth:`update`.

    ``name`` is the layer's, for errors. ``sample_rows`` and ``seed`` belong to the sample, ``block_size`` to the crest
    factors. ``block_cols`` is how many columns of the second moment are computed at a time.

    Raises:
        ShapeError: a size that is not positive.
    """

    def __init__(
        self,
        cols: int,
        *,
        wanted: Wanted = Wanted.ALL,
        sample_rows: int = DEFAULT_SAMPLE_ROWS,
        seed: int = 0,
        block_size: int = 32,
        block_cols: int = DEFAULT_BLOCK_COLS,
        device: torch.device | str = "cpu",
        name: str = "the layer",
    ) -> None:
        sizes = {"cols": cols, "sample_rows": sample_rows, "block_size": block_size, "block_cols": block_cols}
        for what, size in sizes.items():
            if size < 1:
                raise ShapeError(f"{what} of the statistics of {name} must be positive, got {size}")
        self.name = name
        self.cols = cols
        self.wanted = wanted
        self.block_size = block_size
        self.sample_rows = sample_rows
        self.num_tokens = 0
        self.device = place = torch.device(device)
        self.minimum = torch.full((cols,), torch.inf, device=place)
        self.maximum = torch.full((cols,), -torch.inf, device=place)
        self.mean_abs = MeanAbs(cols, place) if Wanted.MEAN_ABS in wanted else None
        self.moments = Moments(cols, place) if Wanted.MOMENTS in wanted else None
        self.second_moment = SecondMoment(cols, place, block_cols) if Wanted.SECOND_MOMENT in wanted else None
        self.reservoir = Reservoir(cols, place, sample_rows, seed) if Wanted.SAMPLE in wanted else None
        self.crest = Crest(cols, place, block_size) if Wanted.CREST in wanted else None
        self.histogram = Histogram(place) if Wanted.HISTOGRAM in wanted else None

    @torch.no_grad()
    def update(self, inputs: Float[Tensor, "... cols"]) -> None:
        """Take in the inputs of one forward call; nothing is taken in where an error is raised.

        Raises:
            ShapeError: the last axis has another length.
            DtypeError: not float.
            NonFiniteError: NaN or Inf, or a number beyond float32.
        """
        if inputs.ndim < 1 or inputs.shape[-1] != self.cols:
            raise ShapeError(
                f"the input of {self.name} must end in {counted(self.cols, 'channel')}, got {list(inputs.shape)}"
            )
        if not inputs.is_floating_point():
            raise DtypeError(f"the input of {self.name} must be float, got {inputs.dtype}")
        rows = inputs.detach().reshape(-1, self.cols).to(self.device)
        if not rows.shape[0]:
            return
        low, high = rows.amin(0).to(torch.float32), rows.amax(0).to(torch.float32)  # NaN stays NaN in both
        if not bool(torch.isfinite(low).logical_and_(torch.isfinite(high)).all()):
            raise NonFiniteError(self._complaint(rows))
        self.minimum = torch.minimum(self.minimum, low)
        self.maximum = torch.maximum(self.maximum, high)
        self.num_tokens += rows.shape[0]
        if self.reservoir is not None:
            self.reservoir.update(rows)
        step = max(1, _CHUNK_VALUES // self.cols)
        for start in range(0, rows.shape[0], step):
            self._take(rows[start : start + step])

    def _take(self, rows: Tensor) -> None:
        wide = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
        for part in (self.mean_abs, self.moments, self.second_moment, self.crest, self.histogram):
            if part is not None:
                part.update(wide)

    def _complaint(self, rows: Tensor) -> str:
        finite = torch.isfinite(rows.to(torch.float32))
        channels = (~finite.all(0)).nonzero().flatten().tolist()
        listed = ", ".join(map(str, channels[:8])) + (" …" if len(channels) > 8 else "")
        return (
            f"the input of {self.name} holds {counted(int((~finite).sum()), 'NaN or Inf value')} out of"
            f" {rows.numel()}, in"
            f" {'channel' if len(channels) == 1 else 'channels'} {listed}; the model overflows on this"
            " text in this dtype, or a weight before this layer is"
            " damaged: try float32 or check the model"
        )

    def merge(self, other: StatisticsCollector) -> None:
        """Take in all that another collector has seen; it stays as it is.

        Raises:
            CalibrationError: it collects something else, or it is this very collector.
        """
        mine = (self.cols, self.wanted, self.block_size, self.sample_rows)
        theirs = (other.cols, other.wanted, other.block_size, other.sample_rows)
        if mine != theirs or other is self:
            raise CalibrationError(
                f"statistics of {self.name} and {other.name} cannot be merged: (cols, wanted, block_size, sample_rows)"
                f" are {mine} and {theirs}" + (" of the same collector" if other is self else "")
            )
        self.num_tokens += other.num_tokens
        self.minimum = torch.minimum(self.minimum, other.minimum.to(self.device))
        self.maximum = torch.maximum(self.maximum, other.maximum.to(self.device))
        for name in ("mean_abs", "moments", "second_moment", "reservoir", "crest", "histogram"):
            part: Any = getattr(self, name)
            if part is not None:
                part.merge(getattr(other, name))

    def result(self) -> InputStatistics:
        """Return what has been collected so far; more may follow.

        Raises:
            NonFiniteError: inputs so large that the second moment overflows float32.
        """
        count = self.num_tokens
        minimum = self.minimum if count else torch.zeros_like(self.minimum)
        maximum = self.maximum if count else torch.zeros_like(self.maximum)
        fields: dict[str, Tensor] = {}
        if self.mean_abs is not None:
            fields["mean_abs"] = (self.mean_abs.total / max(count, 1)).to(torch.float32)
        if self.moments is not None:
            fields |= _shape_of_distribution(self.moments, is_constant=minimum == maximum)
        if self.second_moment is not None:
            fields["second_moment"] = matrix = self.second_moment.mean(count)
            if not bool(torch.isfinite(matrix).all()):
                raise NonFiniteError(
                    f"inputs of {self.name} up to {float(maximum.maximum(-minimum).amax()):.3g} overflow the second"
                    " moment, which is float32; the model is damaged or needs a smaller scale"
                )
        if self.reservoir is not None:
            fields["sample"] = self.reservoir.rows.clone()
        if self.crest is not None:
            fields["crest_mean"] = (self.crest.total / self.crest.count.clamp(min=1)).to(torch.float32)
            fields["crest_max"] = self.crest.largest.clone()
        return InputStatistics(
            name=self.name,
            num_tokens=count,
            block_size=self.block_size,
            amax=torch.maximum(maximum, -minimum),
            minimum=minimum.clone(),
            maximum=maximum.clone(),
            histogram=None if self.histogram is None else self.histogram.sketch,
            **fields,
        )


def _shape_of_distribution(moments: Moments, is_constant: Tensor) -> dict[str, Tensor]:
    count = max(moments.count, 1)
    variance = moments.m2 / count
    # A constant channel is told by its range: rounding of its mean leaves a tiny variance.
    varies = (variance > 0) & ~is_constant
    safe = torch.where(varies, variance, 1.0)
    fields = {
        "mean": moments.mean,
        "std": torch.where(varies, variance, 0.0).sqrt(),
        "skewness": torch.where(varies, moments.m3 / count / safe**1.5, 0.0),
        "kurtosis": torch.where(varies, moments.m4 / count / safe**2, 0.0),
    }
    return {name: value.to(torch.float32) for name, value in fields.items()}
