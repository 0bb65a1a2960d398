"""Quantized stand-ins of a model's layers, one for each candidate, as the method at hand makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from microscale.algorithms import FoldStep, ModelStep, Pipeline, RotationStep, parse_method
from microscale.planning.candidates import Candidate
from microscale.recipes import Calibration, make_recipe, quantize_model
from microscale.recipes.recipe import NONE

PLAIN = "rtn"


def measured_method(method: str, effort: str) -> str:
    """Return the chain that stand-ins are made by: the method's own, or plain rounding where it ties layers together.

    A fold, a rotation across the model and learning of the whole model change what other layers give and take, so one
    layer of their result cannot stand among unquantized ones.
    """
    pipeline = parse_method(method, effort=effort)
    tied = any(pipeline.of_kind(kind) for kind in (FoldStep, RotationStep, ModelStep))
    return PLAIN if tied else pipeline.text


def needs_text(method: str, effort: str) -> bool:
    """Whether a method learns from calibration text."""
    pipeline: Pipeline = parse_method(method, effort=effort)
    return pipeline.needs_calibration


def make_stand_ins(
    model: nn.Module,
    names: Sequence[str],
    candidates: Sequence[Candidate],
    *,
    method: str,
    calibration: Calibration | None,
    progress: Callable[[int, int, str], None],
) -> dict[str, list[nn.Module | None]]:
    """Quantize a copy of the model to each candidate and return its layers by name; the model stays as it is.

    Every layer is measured on what the unquantized model gives. Memory holds the packed layers of all candidates and
    one float copy of the model at a time.

    Raises:
        RecipeError: a candidate that the method cannot give a layer.
        CalibrationError: a method that needs text without any.
    """
    found: dict[str, list[nn.Module | None]] = {name: [] for name in names}
    for candidate in candidates:
        if candidate.is_kept:
            for layers in found.values():
                layers.append(None)
            continue
        whole: Any = copy.deepcopy(model)
        recipe = make_recipe(
            format=candidate.weights,
            activations=candidate.activations or NONE,
            method=method,
            include=tuple(names),
            exclude=("*",),
            rules=tuple({"match": name, "weights": candidate.weights} for name in names),
        )

        def tell(done: int, total: int, name: str, candidate: Candidate = candidate) -> None:
            progress(done, total, f"{candidate.text} {name}")

        quantize_model(whole, recipe, tell, calibration=calibration)
        for name in names:
            found[name].append(whole.get_submodule(name))
        del whole
    return found
