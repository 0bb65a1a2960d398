"""``microscale analyze``: what a model's numbers are like, what formats make of them, and what suits."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Any

import typer

from microscale import __version__
from microscale.calibration import ActivationStore
from microscale.calibration.texts import DEFAULT_FIELD
from microscale.checkpoint import check_text_target, write_text_file
from microscale.cli.analyze_page import MassiveText, analysis_page, massive_values
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
from microscale.errors import CalibrationError, ModelError
from microscale.layerwise import LayerSource
from microscale.nn import unstack_experts
from microscale.planning import DEFAULT_TARGET_DB, Candidate, ModelAnalysis, analyze_model, parse_candidates

DEFAULT_FORMATS = "mxfp4,mxfp4_plus,nvfp4,mxfp6_e2m3,mxfp6_e3m2,mxfp8,mxint8"
DEFAULT_SAMPLES, DEFAULT_WINDOW = 8, 512


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
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients",
            help="Describe the gradients of weights and of the outputs of linear layers too: about three times the"
            " time, and the hidden states of all layers in a temporary directory.",
        ),
    ] = False,
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

    The layers of a local directory of safetensors files are read one at a time.

    Example: `microscale analyze MODEL --calibration text.txt -o report.html`
    """
    from microscale.integrations.calibration import find_tokenizer, read_windows

    tell_missing_kernels()
    if output is not None:
        check_text_target(output)
    started = time.perf_counter()
    candidates = parse_candidates(formats)
    if calibration is None:
        raise CalibrationError("analysis looks at the inputs of layers: give --calibration FILE")
    original, layers = _open(model)
    tokenizer = find_tokenizer(model)
    given = read_windows(
        calibration,
        tokenizer,
        original,
        samples=samples,
        window=window,
        seed=seed,
        field=calibration_field,
        feed="original",
    )
    with _gradient_store() if gradients else contextlib.nullcontext() as store, progress_bar("analyzing") as advance:
        found = analyze_model(
            original, candidates, given, source=layers, gradients=store, target_db=target, progress=advance
        )
    seconds = time.perf_counter() - started
    massive = massive_values(found, given.windows.shape[0], _token_text(tokenizer, given.windows))
    if output is not None:
        facts = {
            "model": model,
            "text": f"{calibration}, {found.num_tokens:,} tokens",
            "layers": str(len(found.layers)),
            "target": f"{target:g} dB",
            "microscale": __version__,
            "time": f"{seconds:.1f} s",
        }
        title = f"{Path(model).name}: analysis of numbers"
        write_text_file(output, analysis_page(title, found, facts, candidates, massive))
    if as_json:
        print_json(_facts(found, candidates, seconds))
        return
    _tell(found, massive)
    if output is None:
        for one in found.recommendations:
            console.print(f"{one.role}, {one.side}: {one.reason}", markup=False, soft_wrap=True)
    wrote = f"wrote {output}" if output is not None else "no page was written (-o report.html)"
    console.print(f"{wrote}; {seconds:.1f} s", markup=False, soft_wrap=True)


def _open(model: str) -> tuple[Any, LayerSource | None]:
    """Return a model without its decoder layers and what reads those one by one, or else the whole model."""
    from microscale.integrations.layerwise import LayerFile
    from microscale.integrations.loading import load_original

    layers: LayerFile | None = None
    if any(Path(model).glob("*.safetensors*")):
        with contextlib.suppress(ModelError):  # the whole model says what is wrong, if anything is
            layers = LayerFile(model)
            layers.read(layers.names[0])
            original = layers.model()
            unstack_experts(original)
            return original, layers
    original = load_original(model)
    unstack_experts(original)
    return original, None


@contextlib.contextmanager
def _gradient_store() -> Generator[ActivationStore, None, None]:
    """Keep the inputs of all layers on disk inside the block."""
    with tempfile.TemporaryDirectory(prefix="microscale-") as folder:
        yield ActivationStore(folder, "gradients")


def _token_text(tokenizer: Any, windows: Any) -> Callable[[int, int], str]:
    def text(window: int, place: int) -> str:
        return str(tokenizer.decode([int(windows[window, place])]))

    return text


def _tell(found: ModelAnalysis, massive: list[MassiveText]) -> None:
    columns = [
        Column(title="format"),
        Column(title="bits", is_number=True),
        Column(title="output error", is_number=True),
    ]
    rows = [[point.candidate, f"{point.bits:.2f}", f"{100 * point.output_error:.3g} %"] for point in found.curve]
    print_table("Geometric mean of the layers' output errors", columns, rows)
    columns = [Column(title=title) for title in ("tensors", "element", "block", "scale", "rule")]
    columns += [Column(title="bits", is_number=True), Column(title="QSNR", is_number=True)]
    advice = [
        [
            f"{one.role}, {one.side}",
            f"E{one.exponent_bits}M{one.mantissa_bits}",
            str(one.block_size),
            one.scale,
            one.rule,
            f"{one.bits:.2f}",
            f"{one.qsnr_db:.1f} dB",
        ]
        for one in found.recommendations
    ]
    print_table("What suits each class of tensors", columns, advice)
    for one in massive:
        console.print(f"massive values in the {one.title}: {one.words}", markup=False, soft_wrap=True)


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
