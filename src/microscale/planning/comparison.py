"""Compare formats on one model: quantize to each, score weights alone and weights with activations, restore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microscale.evaluation import DEFAULT_BATCH, LanguageModel, perplexity
from microscale.formats import parse_activation, parse_format
from microscale.nn import PackedModule, cached_weights, prepare_for_inference
from microscale.recipes import (
    Plan,
    make_plan,
    make_recipe,
    quantize_module,
    replace_module,
    set_activations,
    unstack_experts,
)
from microscale.recipes.apply import check_weight, pipelines_of

MODES = ("w", "w+a")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonResult:
    """One row: ``mode`` is ``none`` (unquantized), ``w`` or ``w+a``.

    ``bits_per_weight`` counts the weights that the format was asked for (all linear layers but the head),
    ``num_bytes`` the whole model.
    """

    format: str
    mode: str
    bits_per_weight: float
    num_bytes: int
    perplexity: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What is being done, for a progress display."""

    format: str
    mode: str
    done: int
    total: int


def compare_formats(
    model: Any,
    formats: Sequence[str],
    windows: Sequence[Tensor],
    language_model: Callable[[Any], LanguageModel],
    *,
    stored_dtype: torch.dtype,
    batch: int = DEFAULT_BATCH,
    progress: Callable[[Step], None] = lambda step: None,
) -> list[ComparisonResult]:
    """Return the unquantized row, then for each format the rows ``w`` and ``w+a``; the model is as before.

    Activations use the same format as the weights. ``stored_dtype`` is what the checkpoint stores, which may differ
    from the dtype of the computation.

    Raises:
        FormatSpecError: before anything is run, for a format that cannot be parsed.
        NonFiniteError: a weight with NaN or Inf.
    """
    for spec in formats:
        parse_format(spec)
    total = len(windows) * (1 + len(MODES) * len(formats))
    counter = _Counter(total=total, report=progress)
    unstack_experts(model)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    width = stored_dtype.itemsize
    call = language_model(model)

    def score_row(name: str, mode: str, bits_per_weight: float, num_bytes: int) -> ComparisonResult:
        label = "unquantized" if mode == "none" else name
        score = perplexity(call, windows, batch=batch, progress=counter.within(label, mode))
        counter.finish(len(windows))
        return ComparisonResult(
            format=name,
            mode=mode,
            bits_per_weight=bits_per_weight,
            num_bytes=num_bytes,
            perplexity=score.perplexity,
            seconds=score.seconds,
        )

    name = str(stored_dtype).removeprefix("torch.")
    results = [score_row(name, "none", 8.0 * width, num_all * width)]
    for spec in formats:
        plan = make_plan(model, make_recipe(format=spec))
        originals = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
        try:
            num_bytes = _swap_in(model, plan)
            num_weights = sum(layer.shape[0] * layer.shape[1] for layer in plan.layers)
            prepare_for_inference(model)
            with cached_weights(model):
                for mode in MODES:
                    set_activations(model, parse_activation(spec) if mode == "w+a" else None)
                    whole = num_bytes + (num_all - num_weights) * width
                    results.append(score_row(spec, mode, 8 * num_bytes / num_weights, whole))
        finally:
            for layer_name, module in originals.items():
                replace_module(model, layer_name, module)
    return results


def _swap_in(model: nn.Module, plan: Plan) -> int:
    """Replace the planned modules by packed ones; returns the bytes of the packed weights."""
    packed: dict[str, PackedModule] = {}
    pipelines = pipelines_of({layer.name: layer for layer in plan.layers})
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        check_weight(module, layer, poison=False)
        packed[layer.name] = quantize_module(module, layer, pipelines[layer.name])
    for name, module in packed.items():
        replace_module(model, name, module)
    return sum(module.num_bytes for module in packed.values())


@dataclass(slots=True)
class _Counter:
    """Counts windows over all rows."""

    total: int
    report: Callable[[Step], None]
    before: int = 0

    def within(self, format: str, mode: str) -> Callable[[int, int], None]:
        def tell(done: int, _: int) -> None:
            self.report(Step(format=format, mode=mode, done=self.before + done, total=self.total))

        self.report(Step(format=format, mode=mode, done=self.before, total=self.total))
        return tell

    def finish(self, num_windows: int) -> None:
        self.before += num_windows
