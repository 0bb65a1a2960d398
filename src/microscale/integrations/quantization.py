"""From a model, a recipe and calibration options to a quantized model: what Python and the command line share.

What cannot work is refused first, by the outline of the model; then the model is read (layer by layer where there is a
directory to work in), the calibration source becomes windows, the recipe is carried out, and static activation ranges
are measured. Writing a checkpoint is left to
:mod:`microscale.integrations.saving`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from microscale.algorithms import parse_method, read_method, with_budget
from microscale.calibration import ActivationStore
from microscale.errors import CalibrationError, ModelError, RecipeError, check_kind
from microscale.integrations.allocating import AutoRecipe, FoundAllocation, find_recipe, is_auto, make_auto_recipe
from microscale.integrations.attention import apply_attention, attention_modules
from microscale.integrations.calibration import (
    CalibrationOptions,
    check_tokenizer,
    checked_source,
    find_tokenizer,
    is_sequential,
    measure_ranges,
    range_notes,
    read_windows,
)
from microscale.integrations.hf_quantizer import MicroscaleConfig
from microscale.integrations.layerwise import LayerFile, files_identity, outline_model, weights_identity
from microscale.integrations.loading import check_window, load_original
from microscale.integrations.saving import mark_quantized
from microscale.nn import AttentionFormats, attention_entry, freeze, parse_attention
from microscale.recipes import (
    DEFAULT_OBSERVER,
    Calibration,
    QuantizationReport,
    RangeReport,
    Recipe,
    check_job,
    has_static_ranges,
    ignore_progress,
    make_recipe,
    open_store,
    parse_rule,
    quantize_model,
)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is at hand)."""

Stages = Callable[[str], AbstractContextManager[Progress]]
"""Called with the title of a stage: a context that lasts as long as the stage, and gives what its progress goes to."""

QUANTIZING, MEASURING, ALLOCATING = "quantizing", "measuring ranges", "measuring layers"
"""Titles of the stages."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedModel:
    """A model that was quantized, and what was found on the way.

    ``num_weights`` counts all parameters of the model that was given. ``ranges`` is None where none were measured.
    ``store`` keeps the unfinished job on disk, if there was a directory for it: clear it once the result is safe.
    ``allocation`` is what method ``auto`` found.
    """

    model: Any
    report: QuantizationReport
    num_weights: int
    ranges: RangeReport | None
    store: ActivationStore | None
    allocation: FoundAllocation | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it: what runs otherwise than asked, steps that do nothing, what stays as it is."""
        found = [*self.report.plan.notes, *_coverage_notes(self)]
        if self.ranges is not None:
            found.extend(range_notes(self.ranges))
        if self.allocation is not None:
            found.extend(self.allocation.notes[1:])
        return tuple(found)


def _coverage_notes(done: QuantizedModel) -> list[str]:
    """Say which large share of the model is neither quantized nor an embedding or a head."""
    chosen = {layer.name for layer in done.report.plan.layers}
    left: Counter[str] = Counter()
    for name, parameter in done.model.named_parameters():
        owner, leaf = name.rpartition(".")[0], name.rpartition(".")[2]
        is_known = owner in chosen or parameter.ndim < 2 or leaf == "weight"
        if not is_known:
            left[name] += parameter.numel()
    share = sum(left.values()) / done.num_weights
    if share < 0.01:
        return []
    example = left.most_common(1)[0][0]
    return [f"{share:.0%} of the model's weights are no linear layers and stay as they are, e.g. {example}"]


def report_quantizing(progress: Progress) -> Stages:
    """Return stages that report the quantizing, and the measuring of layers before it."""
    return lambda title: contextlib.nullcontext(ignore_progress if title == MEASURING else progress)


def _check_budget(bits: object) -> None:
    if bits is None:
        return
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 0 < bits < math.inf:
        raise RecipeError(f"bits is a number above 0, the mean of stored bits per weight such as 4.5, got {bits!r}")


def choose_recipe(
    format: str | Sequence[str] | None, bits: float | None, *, rules: Sequence[str] = (), **fields: Any
) -> Recipe | AutoRecipe:
    """Return the recipe that a caller's words stand for, or for method ``auto`` what is to find one.

    ``bits`` is a budget of weights, for ``auto`` and for methods that have one of their own. ``fields`` are those of
    :func:`microscale.recipes.make_recipe`.

    Raises:
        RecipeError, FormatError, AllocationError: words that cannot be read, or do not go together.
    """
    method = str(fields.get("method", "rtn"))
    _check_budget(bits)
    if is_auto(method):
        candidates = format if format is None or isinstance(format, str) else ",".join(format)
        return make_auto_recipe(bits=bits, formats=candidates, rules=rules, **fields)
    if format is None:
        parse_method(method)  # an unknown method is the better thing to say
        raise RecipeError("name a format (--format mxfp4) or a recipe (--recipe FILE); see `microscale formats`")
    if bits is not None:
        fields["method"] = with_budget(read_method(method), bits)
    return make_recipe(format=format, rules=tuple(parse_rule(rule) for rule in rules), **fields)


def quantize_original(
    model: Any,
    recipe: Recipe | AutoRecipe,
    calibration: CalibrationOptions,
    *,
    version: str,
    stages: Stages,
    tokenizer: Any = None,
    offload: str | Path | None = None,
) -> QuantizedModel:
    """Quantize a transformers model (changed in place), or one that is read from a directory or by its hub name.

    ``version`` is ours, for the model's config and for the identity of a job in ``offload``. Text is read with
    ``tokenizer``, or with the one beside the model. For an :class:`AutoRecipe` the whole model is read at once.

    Raises:
        MicroscaleError: see :func:`microscale.quantize`.
    """
    is_path = isinstance(model, str | Path)
    _refuse_model(model)
    calibration = dataclasses.replace(calibration, source=checked_source(calibration.source))
    is_text = calibration.source is not None and not isinstance(calibration.source, Tensor)
    if tokenizer is None and is_text:
        tokenizer = find_tokenizer(model if is_path else getattr(model, "name_or_path", ""))
    _refuse_words(calibration, tokenizer, offload)
    layers = None
    if isinstance(recipe, Recipe):
        _refuse_early(model, recipe, calibration, is_partial=is_path and offload is not None)
        if is_path and offload is not None:
            layers = LayerFile(model, part=recipe.part)
    original: Any = layers.model() if layers is not None else load_original(model) if is_path else model
    num_weights = sum(parameter.numel() for parameter in original.parameters())
    allocation = None
    if isinstance(recipe, AutoRecipe):
        with stages(ALLOCATING) as advance:
            allocation = find_recipe(original, recipe, calibration, tokenizer=tokenizer, progress=advance)
        recipe, calibration = allocation.recipe, allocation.calibration
    attention = recipe.attention_formats
    if attention is not None:
        attention_modules(original)
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
            observer = calibration.observer or DEFAULT_OBSERVER
            ranges = measure_ranges(original, windows, observer, lambda done, total: advance(done, total, "windows"))
    if attention is not None:
        apply_attention(original, attention)
    mark_quantized(original, version)
    freeze(original)
    return QuantizedModel(
        model=original, report=report, num_weights=num_weights, ranges=ranges, store=store, allocation=allocation
    )


def _refuse_model(model: Any) -> None:
    """Refuse what is neither a model of transformers nor the place of one."""
    if isinstance(model, str | Path) or (isinstance(model, nn.Module) and hasattr(model, "config")):
        return
    raise ModelError(
        f"a transformers model is quantized, or one by its directory or hub name; got {type(model).__name__}. Single"
        " tensors: microscale.quantize_tensor"
    )


def _refuse_words(calibration: CalibrationOptions, tokenizer: Any, offload: object) -> None:
    """Refuse options that say nothing that could be done, whatever the model."""
    if offload is not None and not isinstance(offload, str | Path):
        raise CalibrationError(f"offload is a directory (str or Path), got {type(offload).__name__} {offload!r}")
    is_sequential(calibration.feed)
    for word, least in (("samples", 1), ("window", 2), ("seed", 0)):
        value = getattr(calibration, word)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CalibrationError(f"{word} is a whole number from {least} on, got {value!r}")
    if calibration.source is not None and not isinstance(calibration.source, Tensor):
        check_tokenizer(tokenizer)


def _refuse_early(model: Any, recipe: Recipe, calibration: CalibrationOptions, *, is_partial: bool) -> None:
    """Refuse what cannot work before a text or the weights of a model are read."""
    outline = outline_model(model) if isinstance(model, str | Path) else model
    if outline is None:
        return
    if recipe.attention_formats is not None:
        attention_modules(outline)
    has_text = calibration.source is not None
    check_job(outline, recipe, observer=calibration.observer, has_text=has_text, is_partial=is_partial)
    if has_text and not isinstance(calibration.source, Tensor):
        check_window(outline, calibration.window)


def round_attention(model: Any, attention: str | None, kv_cache: str | None) -> Any:
    """Round the attention of a transformers model and note it in its config; see :func:`microscale.quantize_attention`.

    Raises:
        FormatError, ModelError: no such format, or a model whose attention cannot be rounded.
    """
    check_kind(model, nn.Module, "the model", "a model of transformers", error=ModelError)
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
