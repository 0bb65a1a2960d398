"""MicroMix: the channels of a layer in segments of 4, 6 and 8 bits, by how large their inputs are.

Channels are sorted by the mean magnitude of their inputs, outliers last, and cut into segments: the first in the
layer's own format, the others in wider ones. How many channels a segment gets follows from thresholds. An n-bit format
with exponent bias b and largest number q is good enough for numbers up to

    T(n) = 2^b 2^(n-1) / q * E,   E = max |x| / 254 of the token

because its error is then at most E, that of 8-bit integers with one scale for each token. The share of a segment is
the mean share of the numbers between its threshold and the one before; counts are rounded up to whole granules for all
segments but the first, which gets the rest. Integers, which the paper leaves out, have steps of one size: half of one
is E at T = 2 q E, or (2^n - 1) E with a zero point.

``bits`` scales all thresholds by one factor, so that what is stored fits a budget: the order of the channels included,
unless it is folded into the layers before. What the last whole granules leave of the budget then goes to one segment
after the other, from the narrowest up. ``counts`` gives the number of channels in each segment
by hand, as an allocation over layers does.

Source: arXiv 2508.02343, section 3; granules, counts and E as its authors' implementation has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.algorithms.contract import Formats, GroupProblem, LayerProblem, SegmentStep, option_word
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.formats import (
    ActivationSpec,
    BlockFormat,
    FloatElement,
    Format,
    RangeKind,
    Segment,
    SegmentedFormat,
    TileBlock,
    VectorBlock,
    format_name,
    list_items,
    parse_format,
)
from microscale.kernels.transform import apply_transforms
from microscale.transforms import TransformKind, TransformSpec, permute_transform

PAPER = "paper"
"""The word of ``bits`` for the published thresholds, whatever they cost."""
FOUND = "found"
"""The word of ``counts`` for counts that follow from thresholds."""
SAME, BASE = "same", "base"
"""The words of ``weights``: segments in wider and wider formats, or all in the layer's own."""
WIDE_LAYER, WIDE_GRANULE, GRANULE = 2048, 128, 32
"""From this width on segments are multiples of 128 channels, below of 32."""
ORDER_BITS = 8 * TransformSpec(kind=TransformKind.PERMUTE).num_bytes(1)
"""What a layer stores for each channel, to find it."""
LARGEST_FACTOR_LOG2, SEARCH_STEPS = 20.0, 40
"""Factors of the thresholds are sought between 2^-20 and 2^20, where the narrowest segment takes all numbers."""


def threshold_factor(fmt: BlockFormat) -> float:
    """Return T(n) / E: up to how many times the error of 8-bit integers a number may have in a format."""
    element = fmt.element
    if isinstance(element, FloatElement):
        return 2.0**element.bias * 2.0 ** (element.bits - 1) / element.max_value
    return 2.0**element.bits - 1 if fmt.zero_point is not None else 2.0 * (2.0 ** (element.bits - 1) - 1)


def granule(formats: Sequence[BlockFormat], cols: int) -> int:
    """Return of which number all segments but the first are multiples: whole blocks of each format."""
    sizes = [fmt.block.size for fmt in formats if isinstance(fmt.block, VectorBlock)]
    return math.lcm(WIDE_GRANULE if cols >= WIDE_LAYER else GRANULE, *sizes)


def relative_magnitudes(rows: Float[Tensor, "tokens cols"]) -> Float[Tensor, "numbers"]:
    """Return |x| / E of all numbers, ascending; a token of zeros has zeros."""
    magnitudes = rows.to(torch.float32).abs()
    error = magnitudes.amax(-1, keepdim=True) / 254
    return torch.where(error > 0, magnitudes / error, 0.0).flatten().sort().values


def segment_counts(
    magnitudes: Float[Tensor, "numbers"], factors: Sequence[float], cols: int, unit: int
) -> tuple[int, ...]:
    """Return how many channels each segment gets, the wider ones first served; ``factors`` bound all but the last."""
    bounds = torch.tensor(factors, dtype=torch.float32, device=magnitudes.device)
    below = torch.searchsorted(magnitudes, bounds, right=True).to(torch.float64) / magnitudes.numel()
    shares = torch.diff(below, prepend=below.new_zeros(1), append=below.new_ones(1)).tolist()
    counts: list[int] = []
    rest = cols
    for share in reversed(shares[1:]):
        count = min(math.ceil(share * cols / unit - 1e-9), rest // unit) * unit
        counts.append(count)
        rest -= count
    return (rest, *reversed(counts))


def counts_within(
    counts_at: Callable[[float], tuple[int, ...]], fits: Callable[[Sequence[int]], bool], unit: int
) -> tuple[int, ...]:
    """Return the counts for the smallest factor of the thresholds that fits a budget, and fill what that leaves.

    All channels in the first segment fit. Filling moves ``unit`` channels from a segment to the next wider one.
    """
    low, high = -LARGEST_FACTOR_LOG2, LARGEST_FACTOR_LOG2
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(counts_at(2.0**middle)) else (middle, high)
    counts = list(counts_at(2.0**high))
    place = 0
    while place < len(counts) - 1:
        moved = [*counts[:place], counts[place] - unit, counts[place + 1] + unit, *counts[place + 2 :]]
        if moved[place] >= 0 and fits(moved):
            counts = moved
        else:
            place += 1
    return tuple(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroMix(SegmentStep):
    """Segments of rising width for channels of rising magnitude.

    ``wider`` lists the formats behind the layer's own; where the layer's own is as fine, weights or inputs keep it. So
    inputs of 8 bits keep their format in every segment. With ``weights=base`` all weights keep theirs. The coarser
    format of a segment decides its threshold: that of the inputs with ``weights=base``, else that of either side.
    ``bits`` is the budget for each weight (with ``weights=base`` for each number of the inputs), or ``paper``;
    ``scale`` multiplies the thresholds of the paper. ``counts`` (as in ``(384,96,32)``) replaces all of that: channels
    of each segment, the layer's own format first.
    """

    name: ClassVar[str] = "micromix"
    source: ClassVar[str] = "arXiv 2508.02343"
    has_budget: ClassVar[bool] = True
    companions: ClassVar[str] = (
        "take scale folds (smoothquant, awq) before micromix, and distill:transform=none, autoround, rtn or gptq"
        " after it"
    )

    wider: str = "(mxfp6_e2m3,mxfp8)"
    bits: str = PAPER
    weights: str = SAME
    scale: float = 1.0
    counts: str = FOUND

    def __post_init__(self) -> None:
        if self.weights not in (SAME, BASE):
            raise RecipeError(f"step micromix: weights must be {SAME} or {BASE}, got {self.weights!r}")
        if not self.scale > 0:
            raise RecipeError(f"step micromix: scale must be positive, got {self.scale:g}")
        if not self._formats():
            raise RecipeError("step micromix: wider lists at least one format, as in wider=(mxfp6_e2m3,mxfp8)")
        self._budget()
        given = self._given_counts()
        if given is not None and (self.bits != PAPER or self.scale != 1.0):
            raise RecipeError("step micromix: counts leave nothing for bits or scale to choose; give one of them")
        if given is not None and len(given) != 1 + len(self._formats()):
            raise RecipeError(
                f"step micromix: counts={self.counts} must hold {1 + len(self._formats())} numbers, one for the layer's"
                f" own format and one for each of wider={self.wider}"
            )

    def _given_counts(self) -> tuple[int, ...] | None:
        if self.counts == FOUND:
            return None
        try:
            found = tuple(int(word) for word in list_items(self.counts.strip().removeprefix("(").removesuffix(")")))
        except ValueError:
            found = ()
        if not found or min(found) < 0 or sum(found) == 0:
            raise RecipeError(f"step micromix: counts must be {FOUND} or numbers like (384,96,32), got {self.counts!r}")
        return found

    def _formats(self) -> tuple[BlockFormat, ...]:
        words = self.wider.strip()
        words = words[1:-1] if words.startswith("(") and words.endswith(")") else words
        found = [parse_format(word) for word in list_items(words)]
        for fmt in found:
            if not isinstance(fmt, BlockFormat):
                raise RecipeError(f"step micromix: a segment cannot be in {format_name(fmt)}; it has one block format")
        return tuple(fmt for fmt in found if isinstance(fmt, BlockFormat))

    def _budget(self) -> float | None:
        if self.bits == PAPER:
            return None
        try:
            return float(self.bits)
        except ValueError:
            raise RecipeError(f"step micromix: bits must be {PAPER} or a number like 5.0, got {self.bits!r}") from None

    @property
    def budget(self) -> float | None:
        """The number of ``bits``, None for the thresholds of the paper."""
        return self._budget()

    def with_budget(self, bits: float) -> MicroMix:
        """Return the step with ``bits``."""
        return dataclasses.replace(self, bits=option_word(float(bits)))

    @property
    def wanted(self) -> Wanted | None:
        """Mean magnitudes of the channels, and tokens for the shares."""
        return Wanted.MEAN_ABS | Wanted.SAMPLE

    def _sides(
        self, fmt: BlockFormat, activations: ActivationSpec | None
    ) -> tuple[tuple[BlockFormat, ...], tuple[BlockFormat, ...]]:
        """Return the formats of the weight's segments and of the inputs' (none where these are not quantized)."""
        wider = self._formats()
        weights = (fmt, *(fmt if self.weights == BASE else _finer(fmt, part) for part in wider))
        own = None if activations is None else activations.format
        return weights, (own, *(_finer(own, part) for part in wider)) if isinstance(own, BlockFormat) else ()

    def _factors(self, weights: Sequence[BlockFormat], inputs: Sequence[BlockFormat]) -> list[float]:
        sides = [side for side in (weights if self.weights == SAME else (), inputs) if side]
        return [min(map(threshold_factor, parts)) for parts in zip(*sides, strict=True)]

    def refusal(self, fmt: Format, activations: ActivationSpec | None) -> str | None:
        """Refuse formats that cannot be a segment, that do not get wider, and budgets that even the first exceeds."""
        if activations is None and self.weights == BASE:
            return "weights=base leaves nothing to choose where inputs are not quantized"
        for part in (fmt, *(() if activations is None else (activations.format,)), *self._formats()):
            if not isinstance(part, BlockFormat) or part.sparse is not None or isinstance(part.block, TileBlock):
                return f"{format_name(part)} cannot be a segment: it needs blocks inside of rows, and no sparse table"
        assert isinstance(fmt, BlockFormat)
        weights, inputs = self._sides(fmt, activations)
        if activations is not None and activations.range is not RangeKind.DYNAMIC and len(set(inputs)) > 1:
            return f"segments of the inputs take their ranges from the numbers at hand, not {activations.range.value}"
        factors = self._factors(weights, inputs)
        if factors != sorted(set(factors)):
            names = ", ".join(format_name(part) for part in (inputs or weights))
            return f"its segments must be ever finer, got {names}; list other formats in wider=(…)"
        lowest = (inputs if self.weights == BASE else weights)[0].bits_per_value()
        budget = self.budget
        if budget is not None and budget < lowest:
            return f"bits={budget:g} is below the {lowest:g} bits of the narrowest segment, the smallest possible"
        return None

    def segmented(self, group: GroupProblem) -> GroupProblem:
        """Return the group with sorted channels, each layer in segments; one that needs a single segment stays."""
        assert group.inputs is not None
        chain = group.layers[0].transforms
        mean = apply_transforms(group.inputs.require("mean_abs").unsqueeze(0), chain).abs().squeeze(0)
        order = torch.argsort(mean, stable=True)
        magnitudes = relative_magnitudes(group.sample)
        alike: dict[tuple[Format, ActivationSpec | None], list[LayerProblem]] = {}
        for layer in group.layers:
            alike.setdefault((layer.format, layer.activations), []).append(layer)
        changed: dict[str, LayerProblem] = {}
        for layers in alike.values():
            counts = self._counts(magnitudes, layers, group)
            changed.update({layer.name: self._cut(layer, counts, order) for layer in layers})
        return dataclasses.replace(group, layers=tuple(changed[layer.name] for layer in group.layers))

    def repeated(self, before: Formats, after: Formats) -> MicroMix | None:
        """Return the step with the counts of a layer that it has cut, or None where one segment was enough."""
        (fmt, activations), (cut, cut_inputs) = before, after
        if not isinstance(cut, SegmentedFormat):
            return None
        assert isinstance(fmt, BlockFormat)
        weights, inputs = self._sides(fmt, activations)
        inner = None if cut_inputs is None else cut_inputs.format
        parts = inner.segments if isinstance(inner, SegmentedFormat) else cut.segments
        own = inputs if isinstance(inner, SegmentedFormat) else weights
        counts, place = [0] * len(own), 0
        for weight, part in zip(cut.segments, parts, strict=True):
            while (weights[place], own[place]) != (weight.format, part.format):
                place += 1
            counts[place] = part.cols
            place += 1
        words = f"({','.join(map(str, counts))})"
        return dataclasses.replace(self, bits=PAPER, scale=1.0, counts=words)

    def _cut(self, layer: LayerProblem, counts: Sequence[int], order: Tensor) -> LayerProblem:
        if counts[0] == sum(counts):
            return layer
        assert isinstance(layer.format, BlockFormat)
        weights, inputs = self._sides(layer.format, layer.activations)
        spec = layer.activations
        if len(set(inputs)) > 1:
            spec = ActivationSpec(format=_segments(inputs, counts))
        layer = layer.with_transforms([permute_transform(order)])
        return dataclasses.replace(layer, format=_segments(weights, counts), activations=spec)

    def _counts(self, magnitudes: Tensor, layers: Sequence[LayerProblem], group: GroupProblem) -> tuple[int, ...]:
        fmt, cols = layers[0].format, group.cols
        assert isinstance(fmt, BlockFormat)
        weights, inputs = self._sides(fmt, layers[0].activations)
        given = self._given_counts()
        if given is not None:
            return self._checked_counts(given, [*weights, *inputs], layers[0].name, cols)
        unit = granule([*weights, *inputs], cols)
        factors = self._factors(weights, inputs)[:-1]

        def counts_at(scale: float) -> tuple[int, ...]:
            return segment_counts(magnitudes, [scale * factor for factor in factors], cols, unit)

        budget = self.budget
        if budget is None:
            return counts_at(self.scale)
        rows = sum(layer.weight.shape[0] for layer in layers)
        paid = inputs if self.weights == BASE else weights
        is_free = self.weights == BASE or group.is_order_folded
        order_bits = 0.0 if is_free else ORDER_BITS * len(layers) / rows

        def fits(counts: Sequence[int]) -> bool:
            pairs = zip(paid, counts, strict=True)
            bits = sum(count * part.bits_per_value(rows, count) for part, count in pairs if count) / cols
            return bits + (order_bits if counts[0] < cols else 0.0) <= budget + 1e-9

        return counts_within(counts_at, fits, unit)

    def _checked_counts(
        self, given: tuple[int, ...], formats: Sequence[BlockFormat], name: str, cols: int
    ) -> tuple[int, ...]:
        """Return counts given by hand.

        Raises:
            RecipeError: another number of channels than the layer has, or blocks that are cut.
        """
        unit = math.lcm(*(fmt.block.size for fmt in formats if isinstance(fmt.block, VectorBlock)))
        if sum(given) != cols or any(count % unit for count in given[1:]):
            raise RecipeError(
                f"layer {name}: step micromix: counts={self.counts} must add up to the layer's {cols} channels, all but"
                f" the first in multiples of {unit}"
            )
        return given


def _finer(own: BlockFormat, other: BlockFormat) -> BlockFormat:
    """Return the format with the higher threshold; the layer's own of equal ones."""
    return other if threshold_factor(other) > threshold_factor(own) else own


def _segments(formats: Sequence[BlockFormat], counts: Sequence[int]) -> SegmentedFormat:
    """Return the segments that have channels."""
    pairs = zip(formats, counts, strict=True)
    return SegmentedFormat(segments=tuple(Segment(format=fmt, cols=count) for fmt, count in pairs if count))
