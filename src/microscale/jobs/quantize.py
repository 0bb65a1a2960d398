"""From a model and a recipe to a quantized model, and to a checkpoint where a place is named.

What cannot work is refused first: by the words, then by the outline of the model. Then the model is read (layer by
layer where there is a directory to work in), the calibration source becomes windows, the recipe is carried out, static
activation ranges are measured, and the checkpoint is written.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microscale.checkpoint.compressed_tensors import layout_inputs
from microscale.checkpoint.writer import check_target
from microscale.errors import CalibrationError, CheckpointWriteError, RecipeError, counted
from microscale.formats import RangeKind
from microscale.integrations.attention import attention_modules
from microscale.integrations.cache_scales import settle_cache
from microscale.integrations.loading import check_window
from microscale.integrations.originals import Original
from microscale.integrations.places import leftover_of
from microscale.integrations.saving import check_shard_size, mark_quantized, save_model
from microscale.jobs.allocate import FoundRecipe
from microscale.jobs.calibration import (
    check_tokenizer,
    checked_source,
    measure_ranges,
    parse_experts,
    parse_feed,
    range_notes,
    read_windows,
)
from microscale.jobs.quantize_options import QuantizeOptions
from microscale.jobs.recipe_choice import AutoRecipe, choose_recipe, find_recipe
from microscale.jobs.reporting import SILENT, Reporter
from microscale.jobs.shared_options import CalibrationOptions
from microscale.jobs.words import activation_word, duration_text, format_word
from microscale.layerwise.devices import chosen_device, fits, on_device
from microscale.nn.attention_setting import NOT_ROUNDED, model_attention
from microscale.nn.inference import freeze
from microscale.nn.sizes import Size, size_text
from microscale.planning.inspection import Inspection, inspect_checkpoint
from microscale.recipes.apply import QuantizationReport, Walk, check_job, quantize_model
from microscale.recipes.calibration import Calibration, CalibrationText
from microscale.recipes.forecast import Forecast
from microscale.recipes.offload import open_store
from microscale.recipes.ranges import DEFAULT_OBSERVER, RangeReport, has_static_ranges
from microscale.recipes.recipe import Recipe
from microscale.version import __version__

QUANTIZING, MEASURING, ALLOCATING = "quantizing", "measuring ranges", "measuring layers"
"""Titles of the stages."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint:
    """Where a quantized model was written, in which layout, and what lies there."""

    output: Path
    layout: str
    inspection: Inspection


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizeResult:
    """A model that was quantized, what was found on the way, and how long all took.

    ``before`` is the size of the whole original, where a weight that is tied counts once.
    ``ranges`` is None where none were measured, ``allocation`` where method ``auto`` was not asked for, ``checkpoint``
    where nothing was written. ``notes``: what runs otherwise than asked, steps that do nothing, what stays as it is.
    """

    model: Any
    report: QuantizationReport
    before: Size
    ranges: RangeReport | None
    allocation: FoundRecipe | None
    checkpoint: Checkpoint | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def schemes(self) -> dict[tuple[str, str | None], int]:
        """Count the layers of each pair of words for weights and inputs; None where inputs are not rounded."""
        return Counter(
            (format_word(one.format), None if one.activations is None else activation_word(one.activations))
            for one in self.report.plan.layers
        )

    def as_json(self) -> dict[str, Any]:
        """Return what was done and written; what only a checkpoint tells is None without one."""
        plan, written = self.report.plan, self.checkpoint
        inspection = None if written is None else written.inspection
        return {
            "output": None if written is None else str(written.output),
            "layout": plan.layout if written is None else written.layout,
            "layers": len(plan.layers),
            "schemes": [
                {"weights": weights, "activations": inputs, "layers": count}
                for (weights, inputs), count in self.schemes.items()
            ],
            "unquantized": plan.unquantized,
            "attention": (model_attention(self.model) or NOT_ROUNDED).words,
            "bits_per_weight": self.report.bits_per_weight,
            "bits_per_weight_model": None if inspection is None else 8 * inspection.num_bytes / self.before.num_weights,
            "bits_per_weight_before": self.before.bits_per_weight,
            "bytes": None if inspection is None else inspection.num_bytes,
            "bytes_before": self.before.num_bytes,
            "file_bytes": None if inspection is None else inspection.file_bytes,
            "expert_tokens": dict(self.report.expert_tokens),
            "allocation": self.allocation,
            "notes": self.notes,
            "seconds": self.seconds,
        }


def quantize(options: QuantizeOptions, reporter: Reporter = SILENT) -> QuantizeResult:
    """Quantize a transformers model (changed in place), or one that is read from a directory or by its hub name.

    An unfinished job stays in the directory of ``offload`` until its checkpoint is written.

    Raises:
        MicroscaleError: see :func:`microscale.quantize`.
    """
    started = time.perf_counter()
    device = chosen_device(options.device)
    recipe, options = _refuse_words(options)
    original = Original(options.model, tokenizer=options.tokenizer)
    calibration, is_layered = options.calibration, options.offload is not None and original.path is not None
    tokenizer = original.tokenizer() if options.output is not None or _is_text(calibration) else None
    if _is_text(calibration):
        check_tokenizer(tokenizer)
    if isinstance(recipe, Recipe):
        walk = Walk.LAYERS if is_layered else Walk.WHOLE
        _refuse_early(original.outline(), recipe, calibration, walk)
    layers = original.layers(part=recipe.part) if is_layered and isinstance(recipe, Recipe) else None
    model = original.whole() if layers is None else layers.model()
    before = _original_size(model)
    allocation = None
    if isinstance(recipe, AutoRecipe):
        with on_device(model, device), reporter.stage(ALLOCATING) as advance:
            allocation, calibration = find_recipe(model, recipe, calibration, tokenizer=tokenizer, progress=advance)
        recipe = allocation.recipe
    attention = recipe.attention_formats
    if attention is not None:
        attention_modules(model)
    windows = None
    if calibration.source is not None:
        windows = read_windows(calibration, tokenizer, model, feed=calibration.feed, experts=calibration.experts)
    store = None
    if options.offload is not None:
        store = open_store(options.offload, f"{__version__} {original.identity()}", recipe, windows)
    with reporter.stage(QUANTIZING) as advance:
        report = quantize_model(
            model,
            recipe,
            advance,
            calibration=windows,
            store=store,
            source=layers,
            device=device,
            forecast=lambda found: reporter.note(forecast_text(found)),
        )
    ranges = _measured_ranges(model, windows, calibration.observer or DEFAULT_OBSERVER, device, reporter)
    settle_cache(model, attention)
    mark_quantized(model)
    freeze(model)
    checkpoint = None
    if options.output is not None:
        checkpoint = _write(model, report, options.output, recipe.layout, options, tokenizer)
    if store is not None:
        store.clear()
    return QuantizeResult(
        model=model,
        report=report,
        before=before,
        ranges=ranges,
        allocation=allocation,
        checkpoint=checkpoint,
        notes=tuple(_notes(model, report, before.num_weights, ranges, allocation))
        + _tokenizer_notes(original, tokenizer, checkpoint),
        seconds=time.perf_counter() - started,
    )


def _original_size(model: nn.Module) -> Size:
    """Return the size of a model that is yet to be quantized, with the tensors of its file that it has no place for."""
    parameters = list(model.parameters())
    size = Size(
        num_weights=sum(one.numel() for one in parameters),
        num_bytes=sum(one.numel() * one.element_size() for one in parameters),
    )
    leftover = leftover_of(model)
    return size if leftover is None else size + leftover.size


def _refuse_words(options: QuantizeOptions) -> tuple[Recipe | AutoRecipe, QuantizeOptions]:
    """Refuse what says nothing that could be done, whatever the model; return the recipe and the checked options."""
    recipe = choose_recipe(options.recipe, default_layout=None if options.output is None else "auto")
    source = checked_source(options.calibration.source)
    if isinstance(recipe, AutoRecipe) and source is None:
        raise CalibrationError("method auto measures layers on text: give --calibration FILE (calibration=… in Python)")
    if options.output is not None:
        if isinstance(recipe, Recipe) and source is None:
            _refuse_static(recipe)
        _refuse_places(options, options.output)
        check_target(options.output, overwrite=options.overwrite)
        check_shard_size(options.max_shard_size)
    parse_feed(options.calibration.feed)
    parse_experts(options.calibration.experts)
    return recipe, dataclasses.replace(options, calibration=dataclasses.replace(options.calibration, source=source))


def _refuse_static(recipe: Recipe) -> None:
    """Refuse to write static activation ranges that nothing was measured for: the checkpoint could not run."""
    for asked in (recipe.activations, *(rule.activations for rule in recipe.layer_rules)):
        spec = None if asked is None else asked.record
        if recipe.layout == "compressed-tensors":
            spec = layout_inputs(str(asked)) or spec
        if spec is not None and spec.range is RangeKind.STATIC:
            raise RecipeError(f"activations {spec} need text to measure their range on: give --calibration FILE")


def _refuse_places(options: QuantizeOptions, output: Path) -> None:
    """Refuse to write over the model that is being read, and to keep an unfinished job where the checkpoint will be."""
    target = output.resolve()
    if isinstance(options.model, str | Path):
        source = Path(options.model).resolve()
        if source.exists() and (target == source or target in source.parents):
            raise CheckpointWriteError(f"{output} is (or holds) the model that is read; choose another place with -o")
    offload = options.offload
    if offload is not None and (offload.resolve() == target or target in offload.resolve().parents):
        raise CheckpointWriteError(f"--offload {offload} lies in {output}, which is written at the end; choose another")


def _is_text(calibration: CalibrationOptions) -> bool:
    return calibration.source is not None and not isinstance(calibration.source, Tensor)


def _refuse_early(outline: Any, recipe: Recipe, calibration: CalibrationOptions, walk: Walk) -> None:
    """Refuse what cannot work before a text or the weights of a model are read."""
    if outline is None:
        return
    if recipe.attention_formats is not None:
        attention_modules(outline)
    text = CalibrationText.ABSENT if calibration.source is None else CalibrationText.GIVEN
    check_job(outline, recipe, observer=calibration.observer, text=text, walk=walk)
    if _is_text(calibration):
        check_window(outline, calibration.window)


def forecast_text(found: Forecast) -> str:
    """Return what a job will take in words, such as ``about 12 min and 3.10 GB for 30 layers``."""
    memory = [size_text(found.num_bytes)] if found.num_bytes else []
    if found.device_bytes is not None:
        memory.append(f"{size_text(found.device_bytes)} of the GPU's memory")
    *amounts, last = [duration_text(found.seconds), *memory]
    amounts = f"{', '.join(amounts)} and {last}" if amounts else last
    steps, layers = " and ".join(found.learning), counted(found.layers, "layer")
    if found.is_ahead:
        return f"about {amounts} for {steps}, before {layers} are rounded"
    note = f"about {amounts} for {layers}"
    return f"{note}, {duration_text(found.learning_seconds)} of it {steps}" if steps else note


def _measured_ranges(
    model: nn.Module, windows: Calibration | None, observer: str, device: torch.device | None, reporter: Reporter
) -> RangeReport | None:
    """Measure static ranges where there are any: on the device if it holds the model as a whole."""
    if windows is None or not has_static_ranges(model):
        return None
    if device is not None and not fits(model, device):
        reporter.note(f"{device} does not hold the whole model: static ranges are measured where it lies")
        device = None
    with on_device(model, device), reporter.stage(MEASURING) as advance:
        return measure_ranges(model, windows, observer, lambda done, total: advance(done, total, "windows"))


def _write(
    model: Any, report: QuantizationReport, output: Path, word: str | None, options: QuantizeOptions, tokenizer: Any
) -> Checkpoint:
    """Write what was quantized; ``word`` is the layout that was asked for."""
    layout = save_model(
        model,
        output,
        layout=report.plan.layout if word not in (None, "auto") and report.plan.layout else "auto",
        tokenizer=tokenizer,
        overwrite=options.overwrite,
        max_shard_size=options.max_shard_size,
        check=options.check,
        about=_about(options),
    )
    return Checkpoint(output=output, layout=layout, inspection=inspect_checkpoint(output))


def _about(options: QuantizeOptions) -> list[str]:
    """Return what a model card says of how a model was made, beside its formats."""
    text = options.calibration
    if text.source is None:
        return ["No calibration text was used."]
    if isinstance(text.source, str | Path):
        return [
            f"Calibrated on {counted(text.samples, 'window')} of {counted(text.window, 'token')} of"
            f" {Path(text.source).name}."
        ]
    return [f"Calibrated on {counted(text.samples, 'window')} of {counted(text.window, 'token')}."]


def _notes(
    model: nn.Module,
    report: QuantizationReport,
    num_weights: int,
    ranges: RangeReport | None,
    allocation: FoundRecipe | None,
) -> Iterator[str]:
    yield from report.plan.notes
    yield from _coverage_notes(model, report, num_weights)
    if ranges is not None:
        yield from range_notes(ranges)
    if allocation is not None:
        yield from allocation.notes


def _coverage_notes(model: nn.Module, report: QuantizationReport, num_weights: int) -> Iterator[str]:
    """Say which large share of the model is neither quantized nor an embedding or a head."""
    chosen = {layer.name for layer in report.plan.layers}
    left: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        owner, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
        is_known = owner in chosen or parameter.ndim < 2 or leaf == "weight"
        if not is_known:
            left[name] += parameter.numel()
    share = sum(left.values()) / num_weights
    if share >= 0.01:
        example = left.most_common(1)[0][0]
        yield f"{share:.0%} of the model's weights are no linear layers and stay as they are, e.g. {example}"


def _tokenizer_notes(original: Original, tokenizer: Any, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    if checkpoint is None or tokenizer is not None:
        return ()
    return (f"{original} has no tokenizer that can be loaded, so none was copied",)
