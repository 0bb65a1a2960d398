"""Quantized stand-ins of a model's layers, one for each candidate, as the method at hand makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from microscale.algorithms.contract import (
    FoldStep,
    Formats,
    FormatStep,
    ModelStep,
    RefineStep,
    RotationStep,
    SegmentStep,
)
from microscale.algorithms.pipeline import Pipeline, beside_segments, make_pipeline, parse_method
from microscale.errors import AllocationError, MicroscaleError
from microscale.formats import NONE
from microscale.nn.linear import QuantizedLinear
from microscale.nn.packed import PackedModule
from microscale.planning.candidates import Candidate
from microscale.recipes.apply import quantize_model
from microscale.recipes.calibration import Calibration, ChannelOrder
from microscale.recipes.plan import make_plan
from microscale.recipes.recipe import Recipe, make_recipe


def layer_method(candidate: Candidate, method: str, effort: str) -> Pipeline:
    """Return the chain by which a recipe quantizes a layer to a candidate.

    A candidate's own method is taken as it is; one that cuts segments takes over what may stand beside them from the
    recipe's ``method``.
    """
    common = parse_method(method, effort=effort, fmt=candidate.weights.record)
    return common if candidate.method is None else beside_segments(candidate.method.pipeline(), common)


def measured_method(candidate: Candidate, method: str, effort: str) -> Pipeline:
    """Return the chain that stand-ins are made by: the layer's own, or plain rounding where it ties layers together.

    A fold, a rotation across the model and learning of the whole model change what other layers give and take, so one
    layer of their result cannot stand among unquantized ones. Folds are left out, and with the others all but changes
    of formats and segments.
    """
    pipeline = layer_method(candidate, method, effort)
    alone = [step for step in pipeline.steps if not isinstance(step, FoldStep)]
    if not is_tied(pipeline):
        return make_pipeline(alone)
    return make_pipeline([*pipeline.of_kind(FormatStep), *pipeline.of_kind(SegmentStep)])


def is_tied(pipeline: Pipeline) -> bool:
    """Whether a chain has steps that make of all layers one problem."""
    return any(pipeline.of_kind(kind) for kind in (RotationStep, ModelStep, RefineStep))


def needs_text(candidates: Sequence[Candidate], method: str, effort: str) -> bool:
    """Whether measuring any candidate takes calibration text for its method."""
    chains = (measured_method(c, method, effort) for c in candidates if not c.is_kept)
    return any(chain.needs_calibration for chain in chains)


def check_candidates(
    model: nn.Module, names: Sequence[str], candidates: Sequence[Candidate], *, method: str, effort: str
) -> None:
    """Refuse candidates that cannot be given to a layer, before anything is measured.

    Raises:
        AllocationError: the method as it will run cannot serve a layer in these formats.
    """
    for candidate in candidates:
        if candidate.is_kept:
            continue
        for chain in {layer_method(candidate, method, effort), measured_method(candidate, method, effort)}:
            try:
                make_plan(model, _recipe(names, candidate, chain))
            except MicroscaleError as error:
                raise AllocationError(
                    f"candidate {candidate.text} does not serve: {error}\nleave it out of the formats, or choose"
                    " another method"
                ) from None


def make_stand_ins(
    model: nn.Module,
    names: Sequence[str],
    candidates: Sequence[Candidate],
    *,
    method: str,
    effort: str,
    calibration: Calibration | None,
    progress: Callable[[int, int, str], None],
) -> dict[str, list[nn.Module | None]]:
    """Quantize a copy of the model to each candidate and return its layers by name; the model stays as it is.

    Every layer is measured on what the unquantized model gives, and can stand alone among unquantized ones: orders of
    channels stay online where a recipe would fold them. Memory holds the packed layers of all candidates and
    one float copy of the model at a time.

    Raises:
        RecipeError: a candidate that the method cannot give a layer.
        CalibrationError: a method that needs text without any.
    """
    found: dict[str, list[nn.Module | None]] = {name: [] for name in names}
    alone = None if calibration is None else replace(calibration, order=ChannelOrder.ONLINE)
    for candidate in candidates:
        if candidate.is_kept:
            for layers in found.values():
                layers.append(None)
            continue
        whole: Any = copy.deepcopy(model)
        recipe = _recipe(names, candidate, measured_method(candidate, method, effort))

        def tell(done: int, total: int, name: str, candidate: Candidate = candidate) -> None:
            progress(done, total, f"{candidate.text} {name}")

        quantize_model(whole, recipe, tell, calibration=alone)
        for name in names:
            found[name].append(whole.get_submodule(name))
        del whole
    return found


def _recipe(names: Sequence[str], candidate: Candidate, chain: Pipeline) -> Recipe:
    """Return a recipe that gives one candidate to these layers and nothing to others."""
    return make_recipe(
        format=candidate.weights,
        activations=candidate.activations or NONE,
        method=chain,
        include=tuple(names),
        exclude=("*",),
        rules=tuple({"match": name, "weights": candidate.weights} for name in names),
    )


def repeating_method(stand_in: nn.Module | None, candidate: Candidate, method: str, effort: str) -> Pipeline | None:
    """Return the method with which a recipe makes a layer like its stand-in; None: the recipe's own.

    Segments are repeated with the counts that the stand-in has, whatever layers are cut beside it.
    """
    if candidate.method is None or stand_in is None:
        return None
    pipeline = layer_method(candidate, method, effort)
    assert candidate.weights.record is not None
    asked = None if candidate.activations is None else candidate.activations.record
    before = pipeline.adapt(candidate.weights.record, asked)
    steps = (step.repeated(before, _formats(stand_in)) for step in pipeline.steps)
    return make_pipeline([step for step in steps if step is not None])


def _formats(stand_in: nn.Module) -> Formats:
    """Return what a layer and its inputs are rounded to."""
    assert isinstance(stand_in, PackedModule)
    quantizer = stand_in.activations if isinstance(stand_in, QuantizedLinear) else None
    return stand_in.tensor.format, None if quantizer is None else quantizer.spec
