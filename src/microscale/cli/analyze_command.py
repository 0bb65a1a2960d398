"""``microscale analyze``: what a model's numbers are like, what formats make of them, and what suits."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from microscale import __version__
from microscale.calibration.texts import DEFAULT_FIELD
from microscale.checkpoint import write_text_file
from microscale.cli.output import (
    Column,
    JsonOption,
    SeedOption,
    command,
    console,
    print_json,
    print_table,
    progress_bar,
    tell_missing_kernels,
)
from microscale.errors import CalibrationError
from microscale.planning import (
    DEFAULT_TARGET_DB,
    Candidate,
    LayerAnalysis,
    ModelAnalysis,
    Recommendation,
    TensorFacts,
    analyze_model,
    parse_candidates,
)
from microscale.recipes import unstack_experts
from microscale.report import Advice, AnalysisRow, ChannelPicture, HistogramPicture, analysis_html

DEFAULT_FORMATS = "mxfp4,mxfp4_plus,nvfp4,mxfp6_e2m3,mxfp6_e3m2,mxfp8,mxint8"
DEFAULT_SAMPLES, DEFAULT_WINDOW = 8, 512
MAX_PICTURES = 8


@command
def analyze(
    model: Annotated[str, typer.Argument(help="Directory or hub name of a transformers causal language model.")],
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Text file, JSON lines or dataset name to run through it.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML page to write.")] = None,
    formats: Annotated[
        str, typer.Option("--formats", "-f", help="Formats WEIGHTS[/ACTIVATIONS] whose error is shown, with commas.")
    ] = DEFAULT_FORMATS,
    target: Annotated[
        float, typer.Option("--target", min=0.0, max=120.0, help="QSNR in decibels that a recommended format reaches.")
    ] = DEFAULT_TARGET_DB,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Windows of text.")] = DEFAULT_SAMPLES,
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens in a window, BOS included.")] = DEFAULT_WINDOW,
    calibration_field: Annotated[
        str, typer.Option("--calibration-field", help="Field of JSON lines or of a dataset that holds the text.")
    ] = DEFAULT_FIELD,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Describe weights and inputs of every layer, the error of each format, and recommend formats with reasons.

    Example: `microscale analyze MODEL --calibration text.txt -o report.html`
    """
    from microscale.integrations.calibration import find_tokenizer, read_windows
    from microscale.integrations.loading import load_original

    tell_missing_kernels()
    started = time.perf_counter()
    candidates = parse_candidates(formats)
    if calibration is None:
        raise CalibrationError("analysis looks at the inputs of layers: give --calibration FILE")
    original: Any = load_original(model)
    unstack_experts(original)
    given = read_windows(
        calibration,
        find_tokenizer(model),
        original,
        samples=samples,
        window=window,
        seed=seed,
        field=calibration_field,
        feed="original",
    )
    with progress_bar("analyzing") as advance:
        found = analyze_model(original, candidates, given, target_db=target, progress=advance)
    seconds = time.perf_counter() - started
    if output is not None:
        facts = {
            "model": model,
            "text": f"{calibration}, {found.num_tokens:,} tokens",
            "layers": str(len(found.layers)),
            "target": f"{target:g} dB",
            "microscale": __version__,
            "time": f"{seconds:.1f} s",
        }
        write_text_file(output, _page(f"{Path(model).name}: analysis of numbers", found, facts))
    if as_json:
        print_json(_facts(found, candidates, seconds))
        return
    _tell(found)
    wrote = f"wrote {output}" if output is not None else "no page was written (-o report.html)"
    console.print(f"{wrote}; {seconds:.1f} s", markup=False, soft_wrap=True)


def _page(title: str, found: ModelAnalysis, facts: dict[str, str]) -> str:
    by_class = {(one.role, one.side): one for one in found.recommendations}
    histograms = [
        HistogramPicture(title=f"{one.role}, {one.side}", shares=one.shares, format=by_class[one.role, one.side].format)
        for one in found.histograms
        if (one.role, one.side) in by_class
    ]
    return analysis_html(
        title,
        [_row(layer) for layer in found.layers],
        facts=facts,
        curve=[(point.candidate, point.bits, point.output_error) for point in found.curve],
        histograms=histograms,
        channels=_channel_pictures(found),
        advice=[_advice(one) for one in found.recommendations],
        massive=_massive(found),
    )


def _row(layer: LayerAnalysis) -> AnalysisRow:
    numbers: dict[str, float | None] = {}
    hints: dict[str, str] = {}
    for letter, facts in (("w", layer.weight), ("x", layer.inputs)):
        top = None if facts is None else facts.percentiles[100.0]
        numbers[f"{letter} max"] = top
        numbers[f"{letter} std"] = None if facts is None else facts.std
        numbers[f"{letter} kurtosis"] = None if facts is None else facts.kurtosis
        numbers[f"{letter} crest"] = None if facts is None else facts.crest_mean
        if facts is not None:
            hints[f"{letter} max"] = _facts_hint(facts)
    numbers["x outlier channels"] = None if layer.inputs is None else float(len(layer.inputs.outlier_channels))
    for name, one in layer.errors.items():
        inputs = "" if one.input_qsnr_db is None else f", inputs {one.input_qsnr_db:.1f} dB"
        hints[name] = f"QSNR: weight {one.weight_qsnr_db:.1f} dB{inputs}"
    return AnalysisRow(
        name=layer.name,
        role=layer.role,
        shape=" × ".join(map(str, layer.shape)),
        numbers=numbers,
        errors={name: one.output_error for name, one in layer.errors.items()},
        hints=hints,
    )


def _facts_hint(facts: TensorFacts) -> str:
    parts = [
        f"from {facts.minimum:.4g} to {facts.maximum:.4g}",
        f"mean {facts.mean:.3g}",
        f"skewness {facts.skewness:.3g}",
    ]
    parts += [f"{percent:g} % below {value:.3g}" for percent, value in facts.percentiles.items() if percent < 100]
    return ", ".join([*parts, f"largest crest factor {facts.crest_max:.1f}"])


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
        pictures.append(ChannelPicture(title=f"input of {layer.name}", values=facts.channels, words=words))
    return pictures


def _massive(found: ModelAnalysis) -> list[tuple[str, str]]:
    shown: list[tuple[str, str]] = []
    seen: set[int] = set()
    for layer in found.layers:
        for side, facts in (("weight", layer.weight), ("input", layer.inputs)):
            if facts is None or not facts.massive or id(facts) in seen:
                continue
            seen.add(id(facts))
            row = "token" if side == "input" else "row"
            listed = "; ".join(f"{one.value:.4g} at {row} {one.row}, channel {one.channel}" for one in facts.massive)
            ratio = abs(facts.massive[0].value) / facts.std if facts.std else 0.0
            shown.append((f"{side} of {layer.name}", f"{listed} (largest: {ratio:.0f} standard deviations)"))
    return shown


def _advice(one: Recommendation) -> Advice:
    parts = f"E{one.exponent_bits}M{one.mantissa_bits}, blocks of {one.block_size}, scale {one.scale}, rule {one.rule}"
    return Advice(title=f"{one.role}, {one.side}", format=one.format, parts=parts, reason=one.reason)


def _tell(found: ModelAnalysis) -> None:
    columns = [
        Column(title="format"),
        Column(title="bits", is_number=True),
        Column(title="output error", is_number=True),
    ]
    rows = [[point.candidate, f"{point.bits:.2f}", f"{100 * point.output_error:.3g} %"] for point in found.curve]
    print_table("Geometric mean of the layers' output errors", columns, rows)
    columns = [Column(title="tensors"), Column(title="format"), Column(title="bits", is_number=True)]
    columns.append(Column(title="QSNR", is_number=True))
    advice = [[f"{r.role}, {r.side}", r.format, f"{r.bits:.2f}", f"{r.qsnr_db:.1f} dB"] for r in found.recommendations]
    print_table("What suits each class of tensors", columns, advice)
    for name, words in _massive(found):
        console.print(f"massive values in the {name}: {words}", markup=False, soft_wrap=True)


def _facts(found: ModelAnalysis, candidates: tuple[Candidate, ...], seconds: float) -> dict[str, Any]:
    return {
        "tokens": found.num_tokens,
        "formats": [candidate.text for candidate in candidates],
        "layers": [dataclasses.asdict(layer) for layer in found.layers],
        "curve": [dataclasses.asdict(point) for point in found.curve],
        "recommendations": [dataclasses.asdict(one) for one in found.recommendations],
        "histograms": [dataclasses.asdict(one) for one in found.histograms],
        "seconds": seconds,
    }
