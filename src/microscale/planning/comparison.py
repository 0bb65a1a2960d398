"""Compare formats on one model: quantize to each, score weights alone and weights with activations, restore.

On request also everything: the head too, and the products of attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from microscale.algorithms.contract import Progress
from microscale.evaluation.perplexity import DEFAULT_BATCH, LanguageModel, perplexity
from microscale.formats import Format, parse_activation, parse_format
from microscale.formats.dtypes import dtype_name
from microscale.kernels import count_executions
from microscale.nn.attention_setting import parse_attention
from microscale.nn.experts import unstack_experts
from microscale.nn.inference import cached_weights, prepare_for_inference
from microscale.nn.modules import replace_module
from microscale.nn.packed import PackedModule
from microscale.nn.sizes import Size, file_size, packed_size
from microscale.planning.executed import Executed, by_name
from microscale.recipes.apply import check_weight, pipelines_of, quantize_module, set_activations
from microscale.recipes.plan import PlannedLayer, make_plan
from microscale.recipes.recipe import make_recipe

MODES = ("w", "w+a")
EVERYTHING = "all"

RoundAttention = Callable[[Any, Format | None], None]
"""Rounds what enters the products of a model's attention to a format from now on; None takes it back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonResult:
    """One row: ``mode`` is ``none`` (unquantized), ``w``, ``w+a`` or ``all``.

    ``bits_per_weight`` counts the weights that the format was asked for (all linear layers, the head only in ``all``),
    ``num_bytes`` and ``model_bits_per_weight`` the whole model, embeddings and norms included. ``executed`` is what ran
    while it was scored.
    """

    format: str
    mode: str
    bits_per_weight: float
    num_bytes: int
    model_bits_per_weight: float
    perplexity: float
    seconds: float
    executed: Executed


def compare_formats(
    model: Any,
    formats: Sequence[str],
    windows: Sequence[Tensor],
    language_model: Callable[[Any], LanguageModel],
    *,
    stored_dtype: torch.dtype,
    batch: int = DEFAULT_BATCH,
    round_attention: RoundAttention | None = None,
    progress: Progress = lambda done, total, label: None,
) -> list[ComparisonResult]:
    """Return the unquantized row, then for each format the rows ``w`` and ``w+a``; the model is as before.

    With ``round_attention`` a third row ``all`` follows, in which the head is quantized too, weight and input, and the
    operands of attention are rounded. Activations use the same format as the weights. ``stored_dtype`` is what the
    checkpoint stores, which may differ from the dtype of the computation.

    Raises:
        FormatSpecError: before anything is run, for a format that cannot be parsed.
        FormatError: with ``round_attention``, likewise for one that attention cannot be rounded to.
        NonFiniteError: a weight with NaN or Inf.
    """
    for spec in formats:
        parse_format(spec)
        if round_attention is not None:
            parse_attention(spec)
    num_modes = len(MODES) + (round_attention is not None)
    unstack_experts(model)
    scorer = _Scorer(
        call=language_model(model),
        windows=windows,
        batch=batch,
        stored_dtype=stored_dtype,
        counter=_Counter(total=len(windows) * (1 + num_modes * len(formats)), report=progress),
    )
    name, nothing = dtype_name(stored_dtype), packed_size(())
    results = [scorer.row(name, "none", 8.0 * stored_dtype.itemsize, file_size(model, nothing, stored_dtype))]
    for spec in formats:
        plan = make_plan(model, make_recipe(format=spec))
        head = _head_layers(model, spec) if round_attention is not None else []
        originals = {layer.name: model.get_submodule(layer.name) for layer in (*plan.layers, *head)}
        try:
            size = _swap_in(model, plan.layers)
            for mode in MODES:
                set_activations(model, parse_activation(spec) if mode == "w+a" else None)
                results.append(scorer.packed_row(model, spec, mode, size))
            if round_attention is not None:
                size += _swap_in(model, head)
                set_activations(model, parse_activation(spec))
                round_attention(model, parse_attention(spec))
                results.append(scorer.packed_row(model, spec, EVERYTHING, size))
        finally:
            if round_attention is not None:
                round_attention(model, None)
            for layer_name, module in originals.items():
                replace_module(model, layer_name, module)
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scorer:
    """Scores the model as it is at the moment, as one row."""

    call: LanguageModel
    windows: Sequence[Tensor]
    batch: int
    stored_dtype: torch.dtype
    counter: _Counter

    def row(self, name: str, mode: str, bits_per_weight: float, whole: Size) -> ComparisonResult:
        label = f"{'unquantized' if mode == 'none' else name} {mode}"
        with count_executions() as counts:
            score = perplexity(self.call, self.windows, batch=self.batch, progress=self.counter.within(label))
        self.counter.finish(len(self.windows))
        return ComparisonResult(
            format=name,
            mode=mode,
            bits_per_weight=bits_per_weight,
            num_bytes=whole.num_bytes,
            model_bits_per_weight=whole.bits_per_weight,
            perplexity=score.perplexity,
            seconds=score.seconds,
            executed=by_name(counts),
        )

    def packed_row(self, model: nn.Module, spec: str, mode: str, size: Size) -> ComparisonResult:
        """Score a model whose packed layers have a size; a head that shares the embedding's weight comes on top."""
        prepare_for_inference(model)
        with cached_weights(model):
            return self.row(spec, mode, size.bits_per_weight, file_size(model, size, self.stored_dtype))


def _head_layers(model: Any, spec: str) -> list[PlannedLayer]:
    """Return the plan of the output head, which may share its weight with the embedding; nothing without a head."""
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = next((name for name, module in model.named_modules() if head is not None and module is head), None)
    if name is None:
        return []
    plan = make_plan(model, make_recipe(format=spec, include=(name,)))
    return [layer for layer in plan.layers if layer.name == name]


def _swap_in(model: nn.Module, layers: Sequence[PlannedLayer]) -> Size:
    """Replace the planned modules by packed ones; returns their size."""
    packed: dict[str, PackedModule] = {}
    pipelines = pipelines_of({layer.name: layer for layer in layers})
    for layer in layers:
        module = model.get_submodule(layer.name)
        check_weight(module, layer, nan="raise")
        packed[layer.name] = quantize_module(module, layer, pipelines[layer.name])
    for name, module in packed.items():
        replace_module(model, name, module)
    return packed_size(packed.values())


@dataclass(slots=True)
class _Counter:
    """Counts windows over all rows."""

    total: int
    report: Progress
    before: int = 0

    def within(self, label: str) -> Callable[[int, int], None]:
        def tell(done: int, _: int) -> None:
            self.report(self.before + done, self.total, label)

        tell(0, 0)
        return tell

    def finish(self, num_windows: int) -> None:
        self.before += num_windows
