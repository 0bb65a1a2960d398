"""From a model, a recipe and calibration options to a quantized model: what Python and the command line share.

The model is read (layer by layer where there is a directory to work in), the calibration source becomes windows, the
recipe is carried out, and static activation ranges are measured. Writing a checkpoint is left to
:mod:`microscale.integrations.saving`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from microscale.calibration import DEFAULT_SAMPLES, DEFAULT_WINDOW, ActivationStore
from microscale.calibration.texts import DEFAULT_FIELD
from microscale.integrations.attention import apply_attention, attention_modules
from microscale.integrations.calibration import FEEDS, find_tokenizer, measure_ranges, read_windows
from microscale.integrations.hf_quantizer import MicroscaleConfig
from microscale.integrations.layerwise import LayerFile, files_identity, weights_identity
from microscale.integrations.loading import load_original
from microscale.integrations.saving import mark_quantized
from microscale.nn import AttentionFormats, attention_entry, parse_attention
from microscale.recipes import (
    DEFAULT_OBSERVER,
    Calibration,
    QuantizationReport,
    RangeReport,
    Recipe,
    has_static_ranges,
    ignore_progress,
    open_store,
    quantize_model,
)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is at hand)."""

Stages = Callable[[str], AbstractContextManager[Progress]]
"""Called with the title of a stage: a context that lasts as long as the stage, and gives what its progress goes to."""

QUANTIZING, MEASURING = "quantizing", "measuring ranges"
"""Titles of the stages."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationOptions:
    """What is calibrated on (``source``; None: nothing) and how; see :func:`microscale.quantize`."""

    source: str | Path | Int[Tensor, "samples tokens"] | None = None
    field: str = DEFAULT_FIELD
    samples: int = DEFAULT_SAMPLES
    window: int = DEFAULT_WINDOW
    feed: str = FEEDS[0]
    seed: int = 0
    observer: str = DEFAULT_OBSERVER


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedModel:
    """A model that was quantized, and what was found on the way.

    ``num_weights`` counts all parameters of the model that was given. ``ranges`` is None where none were measured.
    ``store`` keeps the unfinished job on disk, if there was a directory for it: clear it once the result is safe.
    """

    model: Any
    report: QuantizationReport
    num_weights: int
    ranges: RangeReport | None
    store: ActivationStore | None


def report_quantizing(progress: Progress) -> Stages:
    """Return stages that report the quantizing alone."""
    return lambda title: contextlib.nullcontext(progress if title == QUANTIZING else ignore_progress)


def quantize_original(
    model: Any,
    recipe: Recipe,
    calibration: CalibrationOptions,
    *,
    version: str,
    stages: Stages,
    tokenizer: Any = None,
    offload: str | Path | None = None,
) -> QuantizedModel:
    """Quantize a transformers model (changed in place), or one that is read from a directory or by its hub name.

    ``version`` is ours, for the model's config and for the identity of a job in ``offload``. Text is read with
    ``tokenizer``, or with the one beside the model.

    Raises:
        MicroscaleError: see :func:`microscale.quantize`.
    """
    is_path = isinstance(model, str | Path)
    layers = LayerFile(model, part=recipe.part) if is_path and offload is not None else None
    original: Any = layers.model() if layers is not None else load_original(model) if is_path else model
    attention = recipe.attention_formats
    if attention is not None:
        attention_modules(original)
    num_weights = sum(parameter.numel() for parameter in original.parameters())
    if tokenizer is None and calibration.source is not None and not isinstance(calibration.source, Tensor):
        tokenizer = find_tokenizer(model if is_path else getattr(model, "name_or_path", ""))
    windows = _windows(original, calibration, tokenizer)
    store = None
    if offload is not None:
        identity = files_identity(model) if layers is not None else weights_identity(original)
        store = open_store(offload, f"{version} {identity}", recipe, windows)
    with stages(QUANTIZING) as advance:
        report = quantize_model(original, recipe, advance, calibration=windows, store=store, source=layers)
    ranges = None
    if windows is not None and has_static_ranges(original):
        with stages(MEASURING) as advance:
            ranges = measure_ranges(
                original, windows, calibration.observer, lambda done, total: advance(done, total, "windows")
            )
    if attention is not None:
        apply_attention(original, attention)
    mark_quantized(original, version)
    return QuantizedModel(model=original, report=report, num_weights=num_weights, ranges=ranges, store=store)


def round_attention(model: Any, attention: str | None, kv_cache: str | None) -> Any:
    """Round the attention of a transformers model and note it in its config; see :func:`microscale.quantize_attention`.

    Raises:
        FormatError, ModelError: no such format, or a model whose attention cannot be rounded.
    """
    formats = AttentionFormats(products=parse_attention(attention), kv_cache=parse_attention(kv_cache))
    apply_attention(model, formats)
    noted = getattr(model.config, "quantization_config", None)
    if isinstance(noted, MicroscaleConfig):
        noted.set_entry("attention", attention_entry(model).get("attention"))
    return model


def _windows(model: Any, calibration: CalibrationOptions, tokenizer: Any) -> Calibration | None:
    if calibration.source is None:
        return None
    return read_windows(
        calibration.source,
        tokenizer,
        model,
        samples=calibration.samples,
        window=calibration.window,
        seed=calibration.seed,
        field=calibration.field,
        feed=calibration.feed,
    )
