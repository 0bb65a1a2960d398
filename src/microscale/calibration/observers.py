"""Observers: where the static range of a layer's input should end, from the inputs of calibration.

Each takes the inputs of one layer call by call and then names the range, one float32 number, as ``amax``: the
magnitude that the format's largest scale is made for; what lies beyond is clipped. Written as a word with an optional
argument: ``minmax``, ``percentile(99.99)``, ``ema(0.9)``, ``window(16)``, ``mse``, ``kl``, ``least_squares``.

The observers that ask what a range does to the numbers get the format's own rounding as a function (``Quantize``), for
this room lies beside the kernels.

Special values: NaN or Inf raise; inputs that are all zero give 0; without any input amax is NaN, as in a layer that
was never calibrated.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.calibration.entropy import LinearHistogram, entropy_threshold
from microscale.calibration.histogram import HistogramSketch
from microscale.calibration.sampling import TailSample
from microscale.errors import CalibrationError, NonFiniteError, counted, nearest
from microscale.formats import BlockFormat, ChannelBlock, Format, TensorBlock, format_name

Quantize = Callable[[Float[Tensor, "rows cols"], Float[Tensor, "1"]], Float[Tensor, "rows cols"]]
"""Rounds values to the format at hand with the given amax, in float32."""

_COARSE_STEPS, _COARSE_PER_OCTAVE, _FINE = 24, 4, 8
"""The grid of clip ratios: 2^(-k/4) down to 1/64, then 1/8 of such a step to both sides of the best."""
_STARTS, _STARTS_PER_OCTAVE, _MAX_FITS = 12, 2, 50


class Observer(Protocol):
    """Sees the inputs of a layer and proposes a range."""

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        """Take in the inputs of one call.

        Raises:
            NonFiniteError: NaN or Inf.
        """
        ...

    def amax(self) -> Float[Tensor, "1"]:
        """Return the range in float32; NaN where nothing has been seen."""
        ...


class ObserverKind(Enum):
    """How a range follows from the inputs."""

    MINMAX = "minmax"
    """The largest magnitude."""
    PERCENTILE = "percentile"
    """The magnitude that so many percent of all numbers do not exceed."""
    EMA = "ema"
    """Moving average of the maxima of the calls, with this decay."""
    WINDOW = "window"
    """The largest magnitude of the last so many calls."""
    MSE = "mse"
    """The clip ratio, from a grid, whose rounding has the least squared error."""
    KL = "kl"
    """The range whose rounded histogram is closest to the true one in Kullback-Leibler divergence."""
    LEAST_SQUARES = "least_squares"
    """Rounding and least-squares fit of the scale in turn."""


_DEFAULTS = {ObserverKind.PERCENTILE: 99.99, ObserverKind.EMA: 0.9, ObserverKind.WINDOW: 16.0}
_WORD = re.compile(r"([a-z_]+)(?:\(([0-9.eE+-]+)\))?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserverSpec:
    """A kind of observer and its argument: percent, decay or number of calls; None for kinds that take none.

    Raises:
        CalibrationError: an argument out of range, too many or missing.
    """

    kind: ObserverKind
    argument: float | None = None

    def __post_init__(self) -> None:
        value = self.argument
        if (value is None) == (self.kind in _DEFAULTS):
            takes = "an argument" if self.kind in _DEFAULTS else f"no argument, got {value}"
            raise CalibrationError(f"observer {self.kind.value} takes {takes}")
        if value is None:
            return
        problem = {
            ObserverKind.PERCENTILE: None if 0 < value <= 100 else "a percentile is above 0 and at most 100",
            ObserverKind.EMA: None if 0 < value < 1 else "the decay of ema is between 0 and 1",
            ObserverKind.WINDOW: None if value >= 1 and value.is_integer() else "a window is a whole number of calls",
        }[self.kind]
        if problem:
            raise CalibrationError(f"{problem}, got {value:g}")

    def __str__(self) -> str:
        return self.kind.value if self.argument is None else f"{self.kind.value}({self.argument:g})"


def parse_observer(text: str | ObserverSpec) -> ObserverSpec:
    """Return the observer that a word stands for, e.g. ``percentile(99.9)``; records pass through.

    Raises:
        CalibrationError: an unknown word or a bad argument.
    """
    if isinstance(text, ObserverSpec):
        return text
    match = _WORD.match(text.strip())
    words = [kind.value for kind in ObserverKind]
    if not match or match[1] not in words:
        known = ", ".join(f"{word}(…)" if ObserverKind(word) in _DEFAULTS else word for word in words)
        raise CalibrationError(f"unknown observer {text!r}{nearest(text, words) or ';'} there are {known}")
    kind = ObserverKind(match[1])
    try:
        argument = float(match[2]) if match[2] else _DEFAULTS.get(kind)
    except ValueError:
        raise CalibrationError(f"observer {text!r}: {match[2]!r} is no number") from None
    return ObserverSpec(kind=kind, argument=argument)


def make_observer(
    spec: str | ObserverSpec, *, fmt: Format, quantize: Quantize, name: str = "the layer", seed: int = 0
) -> Observer:
    """Return a new observer for one layer whose inputs are rounded to ``fmt`` by ``quantize``.

    Raises:
        CalibrationError: an unknown observer, or ``kl`` for a format whose rounding depends on a number's neighbours.
    """
    record = parse_observer(spec)
    argument = record.argument or 0.0
    match record.kind:
        case ObserverKind.MINMAX:
            return MinMaxObserver(name)
        case ObserverKind.PERCENTILE:
            return PercentileObserver(argument, name)
        case ObserverKind.EMA:
            return EmaObserver(argument, name)
        case ObserverKind.WINDOW:
            return WindowObserver(int(argument), name)
        case ObserverKind.MSE:
            return MseObserver(quantize, name, seed)
        case ObserverKind.LEAST_SQUARES:
            return LeastSquaresObserver(quantize, name, seed)
        case ObserverKind.KL:
            _check_elementwise(fmt)
            return KlObserver(quantize, name)


def _check_elementwise(fmt: Format) -> None:
    is_plain = (
        isinstance(fmt, BlockFormat)
        and isinstance(fmt.block, TensorBlock | ChannelBlock)
        and not fmt.is_extended
        and fmt.sub_scale is None
        and fmt.sparse is None
    )
    if not is_plain:
        raise CalibrationError(
            f"observer kl compares histograms of single numbers, but {format_name(fmt)} rounds a number by the block"
            " around it; use mse, or a format with one scale for the tensor such as e4m3/tensor:fp32"
        )


def largest_magnitude(inputs: Float[Tensor, "..."], name: str) -> Float[Tensor, "1"]:
    """Return max |x| in float32, [1]; 0 for no numbers.

    Raises:
        NonFiniteError: NaN or Inf.
    """
    if not inputs.numel():
        return torch.zeros(1, device=inputs.device)
    largest = inputs.detach().abs().amax().to(torch.float32).reshape(1)
    if not bool(torch.isfinite(largest)):
        num_bad = int((~torch.isfinite(inputs.to(torch.float32))).sum())
        raise NonFiniteError(
            f"the input of {name} holds {counted(num_bad, 'NaN or Inf value')} out of {inputs.numel()}:"
            " no range follows from"
            " them; the model overflows on this text in this dtype, or a weight is damaged: try float32"
        )
    return largest


class MinMaxObserver:
    """The largest magnitude of all calls."""

    def __init__(self, name: str = "the layer") -> None:
        self.name = name
        self.largest = torch.full((1,), torch.nan)

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        largest = largest_magnitude(inputs, self.name)
        self.largest = torch.fmax(self.largest.to(largest.device), largest)

    def amax(self) -> Float[Tensor, "1"]:
        return self.largest.clone()


class PercentileObserver:
    """A percentile of the magnitudes, zeros included, from a histogram: off by at most 1/32 of itself."""

    def __init__(self, percent: float, name: str = "the layer") -> None:
        self.percent = percent
        self.name = name
        self.sketch: HistogramSketch | None = None

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        largest_magnitude(inputs, self.name)
        sketch = HistogramSketch.of(inputs)
        self.sketch = sketch if self.sketch is None else self.sketch.merge(sketch)

    def amax(self) -> Float[Tensor, "1"]:
        return torch.tensor([torch.nan if self.sketch is None else self.sketch.percentile(self.percent)])


class EmaObserver:
    """decay * before + (1 - decay) * max |x| of the call; the first call counts whole."""

    def __init__(self, decay: float, name: str = "the layer") -> None:
        self.decay = decay
        self.name = name
        self.average: Tensor | None = None

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        largest = largest_magnitude(inputs, self.name)
        if self.average is None:
            self.average = largest
        else:
            self.average = self.decay * self.average + (1 - self.decay) * largest

    def amax(self) -> Float[Tensor, "1"]:
        return torch.full((1,), torch.nan) if self.average is None else self.average.clone()


class WindowObserver:
    """The largest magnitude of the last calls."""

    def __init__(self, calls: int, name: str = "the layer") -> None:
        self.name = name
        self.maxima: deque[Tensor] = deque(maxlen=calls)

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        self.maxima.append(largest_magnitude(inputs, self.name))

    def amax(self) -> Float[Tensor, "1"]:
        return torch.cat(list(self.maxima)).amax().reshape(1) if self.maxima else torch.full((1,), torch.nan)


class _SampledObserver:
    """Judges ranges by the squared error on a sample that holds every extreme row."""

    def __init__(self, quantize: Quantize, name: str = "the layer", seed: int = 0) -> None:
        self.quantize = quantize
        self.name = name
        self.sample = TailSample(seed=seed)

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        largest_magnitude(inputs, self.name)
        self.sample.update(inputs.detach().reshape(-1, inputs.shape[-1]))

    def amax(self) -> Float[Tensor, "1"]:
        if not self.sample.num_rows:
            return torch.full((1,), torch.nan)
        rows, weights = self.sample.result()
        largest = rows.abs().amax().to(torch.float32).reshape(1)
        return self._search(rows.to(torch.float32), weights, largest) if bool(largest > 0) else largest

    def _search(self, rows: Tensor, weights: Tensor, largest: Tensor) -> Tensor:
        raise NotImplementedError

    def error(self, rows: Tensor, weights: Tensor, amax: Tensor) -> float:
        """Return the estimated sum of squared errors over all tokens, rounded with this range."""
        difference = self.quantize(rows, amax).to(torch.float32) - rows
        return float(difference.square().sum(1).to(torch.float64) @ weights)


class MseObserver(_SampledObserver):
    """The clip ratio with the least squared error: a coarse grid over six octaves, then a finer one around its best."""

    def _search(self, rows: Tensor, weights: Tensor, largest: Tensor) -> Tensor:
        coarse = [2.0 ** (-step / _COARSE_PER_OCTAVE) for step in range(_COARSE_STEPS + 1)]
        errors = {ratio: self.error(rows, weights, largest * ratio) for ratio in coarse}
        best = min(errors, key=lambda ratio: (errors[ratio], -ratio))
        for step in range(1 - _FINE, _FINE):
            ratio = best * 2.0 ** (step / (_COARSE_PER_OCTAVE * _FINE))
            if ratio <= 1 and ratio not in errors:
                errors[ratio] = self.error(rows, weights, largest * ratio)
        return largest * min(errors, key=lambda ratio: (errors[ratio], -ratio))


class LeastSquaresObserver(_SampledObserver):
    """Rounding and refitting in turn: y = round(x; a), then a * <x, y> / <y, y>, from the best of some clip ratios.

    With the codes held fixed the second step is the scale of least squared error; it ends when a round brings no gain,
    so the result is never worse than the largest magnitude on the sample.

    Source: the alternation of Lloyd's quantizer (1982), for a grid whose only freedom is its scale.
    """

    def _search(self, rows: Tensor, weights: Tensor, largest: Tensor) -> Tensor:
        starts = [largest * 2.0 ** (-step / _STARTS_PER_OCTAVE) for step in range(_STARTS + 1)]
        best = min(starts, key=lambda amax: self.error(rows, weights, amax))
        amax, least = best, math.inf
        for _ in range(_MAX_FITS):
            rounded = self.quantize(rows, amax).to(torch.float32)
            error = float((rounded - rows).square().sum(1).to(torch.float64) @ weights)
            if not error < least:
                break
            best, least = amax, error
            product = float((rows * rounded).sum(1).to(torch.float64) @ weights)
            square = float(rounded.square().sum(1).to(torch.float64) @ weights)
            amax = amax * (product / square) if square > 0 else amax
        return best


class KlObserver:
    """Entropy calibration on a histogram of the magnitudes that are not zero; see :func:`entropy_threshold`."""

    def __init__(self, quantize: Quantize, name: str = "the layer") -> None:
        self.quantize = quantize
        self.name = name
        self.histogram = LinearHistogram()
        self.largest = MinMaxObserver(name)

    def update(self, inputs: Float[Tensor, "..."]) -> None:
        self.largest.update(inputs)
        self.histogram.update(inputs.detach())

    def amax(self) -> Float[Tensor, "1"]:
        largest = self.largest.amax()
        if not bool(largest > 0):  # NaN too: nothing seen
            return largest
        threshold = entropy_threshold(self.histogram.counts, self.histogram.width, self.quantize)
        return torch.minimum(largest, torch.tensor([threshold], device=largest.device))
