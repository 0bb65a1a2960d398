"""From an analysis to the records that its page shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from microscale.errors import counted
from microscale.planning.analysis import ModelAnalysis
from microscale.planning.candidates import Candidate
from microscale.planning.layer_facts import LayerAnalysis, Side
from microscale.planning.recommendation import Recommendation
from microscale.planning.tensor_facts import MassiveValue, TensorFacts
from microscale.report.analysis import Advice, AnalysisRow, HeatRow, analysis_html
from microscale.report.analysis_pictures import ChannelPicture, HistogramPicture

MAX_PICTURES = 8
MAX_MASSIVE = 40
"""Channels with massive values that are listed; the JSON has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MassiveText:
    """The massive values of a channel in words."""

    title: str
    words: str


def analysis_page(
    title: str,
    found: ModelAnalysis,
    facts: Mapping[str, str],
    candidates: Sequence[Candidate],
    massive: Sequence[MassiveText],
) -> str:
    """Return the HTML page of an analysis.

    Raises:
        DependencyError: jinja2 is not installed.
    """
    by_class = {(one.role, one.side): one for one in found.recommendations}
    histograms = [
        HistogramPicture(title=f"{one.role}, {one.side}", shares=one.shares, format=by_class[one.role, one.side].format)
        for one in found.histograms
        if (one.role, one.side) in by_class
    ]
    return analysis_html(
        title,
        [row for layer in found.layers for row in _rows(layer)],
        heat=[_heat(layer) for layer in found.layers],
        facts=facts,
        curve=[(point.candidate, point.bits, point.output_error) for point in found.curve],
        histograms=histograms,
        grids=list(dict.fromkeys(one.weights.word for one in candidates if not one.is_kept)),
        channels=_channel_pictures(found),
        advice=[_advice(one) for one in found.recommendations],
        massive=[(one.title, one.words) for one in massive],
    )


def _heat(layer: LayerAnalysis) -> HeatRow:
    hints: dict[str, str] = {}
    for name, one in layer.errors.items():
        inputs = "" if one.input_qsnr_db is None else f", inputs {one.input_qsnr_db:.1f} dB"
        hints[name] = f"QSNR: weight {one.weight_qsnr_db:.1f} dB{inputs}"
    errors = {name: one.output_error for name, one in layer.errors.items()}
    return HeatRow(name=layer.name, errors=errors, hints=hints)


def _rows(layer: LayerAnalysis) -> list[AnalysisRow]:
    """Return one row for each tensor of a layer."""
    rows: list[AnalysisRow] = []
    for side, facts in layer.tensors().items():
        decibels: dict[str, float | None] = {}
        for name, one in layer.errors.items():
            known = {
                Side.WEIGHTS: one.weight_qsnr_db,
                Side.INPUTS: one.input_qsnr_db,
                Side.OUTPUT_GRADIENTS: one.gradient_qsnr_db,
            }
            decibels[name] = known.get(side)
        rows.append(
            AnalysisRow(name=layer.name, side=side.value, role=layer.role, numbers=_numbers(facts), qsnr=decibels)
        )
    return rows


def _numbers(facts: TensorFacts) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {
        "rows": float(facts.rows),
        "channels": float(facts.num_channels),
        "min": facts.minimum,
        "max": facts.maximum,
        "mean": facts.mean,
        "std": facts.std,
        "skewness": facts.skewness,
        "kurtosis": facts.kurtosis,
    }
    for percent, value in facts.percentiles.items():
        if percent < 100:
            numbers[f"|{percent:g} %|"] = value
    numbers["crest, mean"], numbers["crest, max"] = facts.crest_mean, facts.crest_max
    numbers["outlier channels"] = float(len(facts.outlier_channels))
    numbers["largest channel"] = facts.outlier_ratio
    numbers["massive values"] = float(len(facts.massive))
    return numbers


def _channel_pictures(found: ModelAnalysis) -> list[ChannelPicture]:
    """Show the inputs whose largest channel stands out most, one picture for each input."""
    sides = {id(layer.inputs): layer for layer in reversed(found.layers) if layer.inputs is not None}
    pairs = [(layer, layer.inputs) for layer in sides.values() if layer.inputs is not None]
    pairs.sort(key=lambda pair: -pair[1].outlier_ratio)
    pictures: list[ChannelPicture] = []
    for layer, facts in pairs[:MAX_PICTURES]:
        listed = ", ".join(map(str, facts.outlier_channels[:8])) + (" …" if len(facts.outlier_channels) > 8 else "")
        words = f"largest channel {facts.outlier_ratio:.1f} times the median channel's root mean square"
        words += f"; outlier channels: {listed}" if listed else "; no outlier channel"
        pictures.append(
            ChannelPicture(
                title=f"input of {layer.name}", values=facts.channels, num_channels=facts.num_channels, words=words
            )
        )
    return pictures


def massive_values(found: ModelAnalysis, windows: int, token: Callable[[int, int], str]) -> list[MassiveText]:
    """Put each channel with massive values into one line; ``token`` gives the text of a token by window and place.

    Channels of activations come first, then those that stand out most. One input of several layers counts once.
    """
    channels: dict[tuple[Side, int], dict[int, _Massive]] = {}
    for layer in found.layers:
        for side, facts in layer.tensors().items():
            for one in facts.massive:
                ratio = abs(one.value) / facts.std if facts.std else 0.0
                own = channels.setdefault((side, one.channel), {})
                known = own.get(id(facts))
                if known is None or ratio > known.ratio:
                    own[id(facts)] = _Massive(
                        layer=layer.name if known is None else known.layer, value=one, ratio=ratio
                    )
    largest = {key: max(own.values(), key=lambda one: one.ratio) for key, own in channels.items()}
    order = sorted(channels, key=lambda key: (key[0] is not Side.INPUTS, -largest[key].ratio))
    shown: list[MassiveText] = []
    for side, channel in order[:MAX_MASSIVE]:
        most, rest = largest[side, channel], len(channels[side, channel]) - 1
        words = f"{most.value.value:.4g} ({most.ratio:.0f} standard deviations) in {most.layer}"
        if most.value.window is None:
            words += f", row {most.value.row}"
        else:
            text = token(most.value.window, most.value.row)
            words += f" at token {most.value.row} ({text!r}), in {most.value.windows} of {counted(windows, 'window')}"
        words += f"; also in {counted(rest, 'other tensor')}" if rest else ""
        shown.append(MassiveText(title=f"channel {channel} of {side.value}", words=words))
    if len(order) > MAX_MASSIVE:
        rest = counted(len(order) - MAX_MASSIVE, "more channel")
        shown.append(MassiveText(title="others", words=f"{rest}; --json lists them all"))
    return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class _Massive:
    """A massive value, the layer that it was found at, and how many standard deviations it is."""

    layer: str
    value: MassiveValue
    ratio: float


def _advice(one: Recommendation) -> Advice:
    parts = f"E{one.exponent_bits}M{one.mantissa_bits}, blocks of {one.block_size}, scale {one.scale}, rule {one.rule}"
    return Advice(title=f"{one.role}, {one.side}", format=one.format, parts=parts, reason=one.reason)
