"""Measure every layer in every candidate: sensitivity, bytes, milliseconds, and the method that makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from microscale.algorithms.contract import Progress
from microscale.algorithms.pipeline import Pipeline
from microscale.evaluation.perplexity import perplexity
from microscale.families.look_up import describe
from microscale.families.running import predict
from microscale.families.structure import ModelStructure
from microscale.formats import SegmentedFormat
from microscale.layerwise.blocks import float32_model
from microscale.nn.linear import QuantizedLinear
from microscale.nn.sizes import Size, held_size, module_bytes
from microscale.planning.allocated_layers import AllocatedLayer
from microscale.planning.candidates import Candidate
from microscale.planning.latency import measure_latencies
from microscale.planning.sensitivity import Sensitivity, measure_sensitivity
from microscale.planning.stand_ins import make_stand_ins, repeating_method
from microscale.recipes.calibration import Calibration
from microscale.transforms import TransformKind


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """All that a budget is solved from: layers and, for each candidate, sensitivity, bytes and milliseconds."""

    layers: tuple[AllocatedLayer, ...]
    candidates: tuple[Candidate, ...]
    sensitivity: Mapping[str, Sequence[float]]
    num_bytes: Mapping[str, Sequence[int]]
    milliseconds: Mapping[str, Sequence[float]] | None
    others: Size
    """The model besides these layers' weights."""
    perplexity: float | None = None
    """That of the unquantized model on the text, where sensitivities are nats of its loss; None where they are not."""
    methods: Mapping[str, Sequence[Pipeline | None]]
    """The method with which a recipe makes a layer as it was measured; None: that of the whole recipe."""


def measure_table(
    model: Any,
    layers: Sequence[AllocatedLayer],
    candidates: Sequence[Candidate],
    *,
    calibration: Calibration,
    method_text: Calibration | None,
    sensitivity: Sensitivity,
    method: str,
    effort: str,
    latency_tokens: int | None,
    progress: Progress,
    check: Callable[[LayerTable], None] = lambda table: None,
) -> LayerTable:
    """Measure every layer in every candidate; the model stays as it is.

    ``calibration`` is what sensitivity is measured on, ``method_text`` what the method learns from. ``check`` sees the
    table before sensitivities (all 0 there) take their time, and may raise.
    """
    names = [layer.name for layer in layers]
    stand_ins = make_stand_ins(
        model, names, candidates, method=method, effort=effort, calibration=method_text, progress=progress
    )
    structure = describe(model)
    blocks = [block.name for block in structure.blocks]
    originals = {name: model.get_submodule(name) for name in names}
    free = _folding(structure)
    num_bytes = {name: [_bytes_of(s, originals[name], name in free) for s in stand_ins[name]] for name in names}
    methods = {
        name: [repeating_method(s, c, method, effort) for s, c in zip(stand_ins[name], candidates, strict=True)]
        for name in names
    }
    rest = held_size(model, without=(layer.name for layer in layers))
    with float32_model(model):
        times = None
        if latency_tokens is not None:
            times = measure_latencies(stand_ins, originals, tokens=latency_tokens, progress=progress)
        table = LayerTable(
            layers=tuple(layers),
            candidates=tuple(candidates),
            sensitivity={name: [0.0] * len(candidates) for name in names},
            num_bytes=num_bytes,
            milliseconds=times,
            others=rest,
            methods=methods,
        )
        check(table)
        found = measure_sensitivity(
            model, stand_ins, blocks, calibration.samples, sensitivity, seed=calibration.seed, progress=progress
        )
        score = None
        if sensitivity is not Sensitivity.ERROR:
            score = perplexity(
                lambda batch: predict(model, batch.to(model.device)), list(calibration.windows), batch=1
            ).perplexity
    return replace(table, sensitivity=found, perplexity=score)


def _folding(structure: ModelStructure) -> set[str]:
    """Return the layers whose order of channels is folded by a recipe, whatever is chosen for the others."""
    groups = [(block.name, group) for block in structure.blocks for group in block.groups]
    return {f"{name}.{group.linears[0]}" for name, group in groups if group.sources and len(group.linears) == 1}


def _bytes_of(stand_in: nn.Module | None, original: nn.Module, is_order_folded: bool) -> int:
    """Return what a layer's file holds; an order that a recipe folds costs nothing there."""
    free = 0
    if isinstance(stand_in, QuantizedLinear) and is_order_folded and isinstance(stand_in.format, SegmentedFormat):
        specs = () if stand_in.transforms is None else stand_in.transforms.specs
        free = sum(s.num_bytes(stand_in.shape[1]) for s in specs[-1:] if s.kind is TransformKind.PERMUTE)
    return module_bytes(original if stand_in is None else stand_in) - free
