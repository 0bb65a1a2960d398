"""check_algorithm: what every step of a method must do, whatever it does besides."""

from __future__ import annotations

import dataclasses

import pytest

from method_problems import (
    group_problem,
    layer_problem,
)
from microscale.algorithms.contract import (
    BlockStep,
    FoldStep,
    FormatStep,
    ModelStep,
    RefineStep,
    RotationStep,
    RoundStep,
    SegmentStep,
    SideStep,
    Step,
    TransformStep,
)
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.registry import METHODS, STEPS
from microscale.formats import parse_format
from microscale.kernels import dequantize
from small_models import same_bits
from step_checks import (
    check_fold,
    check_fold_of_odd_inputs,
    check_formats,
    check_learning_from_a_decoder_layer,
    check_learning_from_a_model,
    check_learning_where_an_expert_saw_no_token,
    check_rounding,
    check_rounding_of_odd_inputs,
    check_side_path,
    check_transform,
    check_transform_of_odd_widths,
)

# Options that keep a step to a second; the rest is the default.
QUICK: dict[str, str] = {
    "distill": "distill:epochs=4,batch=2",
    "autoround": "autoround:steps=30",
    "omniquant": "omniquant:epochs=8",
    "flatquant": "flatquant:epochs=8",
    "batquant": "batquant:epochs=8",
    "spinquant": "spinquant:steps=4",
    "awq": "awq:steps=8",
    "balance": "balance:size=1",
}
SMOOTH = "smoothquant:search=true"
"""A fixed exponent is not the best of anything; the searched one is."""
ROUNDING = ["rtn", "rtn:search=true", "rtn:weighted=true", "gptq", "gptq:order=false", "gptq:search=true"]


def steps_of(kind: type[Step]) -> list[str]:
    """Return every step of a kind, with options that make it quick."""
    words = [QUICK.get(name, name) for name, found in STEPS.items() if issubclass(found, kind)]
    return [SMOOTH if word == "smoothquant" else word for word in words]


def test_every_step_is_checked_here() -> None:
    found_ahead = (FormatStep, RotationStep, ModelStep, FoldStep, TransformStep, SegmentStep, BlockStep)
    kinds = (*found_ahead, RoundStep, RefineStep, SideStep)
    assert all(sum(issubclass(found, kind) for kind in kinds) == 1 for found in STEPS.values())
    assert all(found.source for found in STEPS.values())
    for text in METHODS.values():
        pipeline = parse_method(text)
        assert parse_method(pipeline.text) == pipeline, "the full text of a chain stands for the same chain"


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp4_plus", "nvfp4", "int4_asym"])
@pytest.mark.parametrize("text", ROUNDING)
def test_rounding(text: str, fmt: str) -> None:
    check_rounding(text, fmt)


@pytest.mark.parametrize("text", ROUNDING)
def test_rounding_of_odd_inputs(text: str) -> None:
    check_rounding_of_odd_inputs(text)


@pytest.mark.parametrize("text", steps_of(FoldStep))
@pytest.mark.parametrize("activations", [None, "mxfp4"])
def test_folds(text: str, activations: str | None) -> None:
    check_fold(text, activations)


@pytest.mark.parametrize("text", steps_of(FoldStep))
def test_folds_of_odd_inputs(text: str) -> None:
    check_fold_of_odd_inputs(text)


@pytest.mark.parametrize("text", [*steps_of(TransformStep), "hadamard:signs=true", "hadamard:size=16"])
def test_transforms(text: str) -> None:
    check_transform(text)


@pytest.mark.parametrize("text", steps_of(TransformStep))
def test_transforms_of_odd_widths(text: str) -> None:
    check_transform_of_odd_widths(text)


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp4_plus"])
@pytest.mark.parametrize("text", steps_of(BlockStep))
def test_learning_from_a_decoder_layer(text: str, fmt: str) -> None:
    check_learning_from_a_decoder_layer(text, fmt)


@pytest.mark.parametrize("text", steps_of(BlockStep))
def test_learning_where_an_expert_saw_no_token(text: str) -> None:
    check_learning_where_an_expert_saw_no_token(text)


@pytest.mark.parametrize("text", steps_of(ModelStep))
def test_learning_from_a_model(text: str) -> None:
    check_learning_from_a_model(text)


@pytest.mark.parametrize("text", steps_of(SideStep))
def test_side_paths(text: str) -> None:
    check_side_path(text)


@pytest.mark.parametrize("text", steps_of(FormatStep))
@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp4_plus", "nvfp4", "int4_asym", "mxfp8", "pair(mxfp4,mxfp8,25%)"])
def test_formats(text: str, fmt: str) -> None:
    check_formats(text, fmt)


IDLE = [
    ("rule:weights=prescale(0.75)", "nvfp4", "no powers of two"),
    ("rule", "nvfp4", "no powers of two"),
    ("rule", "mxfp8", "up to 4 bits"),
    ("rule", "mxfp4_plus", "plus needs the rule that it has"),
    ("rule", "int4_asym", "no powers of two"),
    ("rule", "adaptive_2_4", "several formats"),
    ("rule:weights=keep", "mxfp4", "keep leaves its rule"),
    ("rule:weights=floor", "mxfp4", "has the rule floor already"),
    ("rtn:search=true", "e2m1/tensor:fp32", "needs blocks"),
    ("rtn:weighted=true", "e2m1/16x16:e8m0", "needs blocks"),
    ("gptq:search=true", "e2m1/16x16:e8m0", "needs blocks"),
    ("permute", "int8/channel:fp32", "it has none"),
]


@pytest.mark.parametrize(("word", "spec", "reason"), IDLE)
def test_a_step_says_where_it_changes_nothing(word: str, spec: str, reason: str) -> None:
    """It says so, and it is so: the weight is what the same chain makes without the step or its option."""
    fmt = parse_format(spec)
    chain = parse_method(word)
    (note,) = chain.idleness(fmt, None)
    assert note.startswith(f"step {chain.steps[0].name} changes nothing for ") and reason in note
    group = group_problem(dataclasses.replace(layer_problem(), format=fmt))
    plain = parse_method("gptq" if word.startswith("gptq") else "rtn")
    changed = dataclasses.replace(group.layers[0], format=chain.adapt(fmt, None)[0])
    for step in chain.of_kind(TransformStep):
        changed = changed.with_transforms(step.transforms(group))
    found, expected = chain.rounding.quantize(changed), plain.rounding.quantize(group.layers[0])
    assert same_bits(dequantize(found), dequantize(expected))


@pytest.mark.parametrize(
    ("word", "spec"),
    [
        ("rule", "mxfp4"),
        ("rule:weights=prescale(0.75)", "mxfp8"),
        ("rtn:search=true", "nvfp4"),
        ("rtn:search=true", "int8/channel:fp32"),
        ("permute", "nvfp4"),
        ("mxplus", "mxfp4"),
    ],
)
def test_a_step_that_changes_something_does_not_say_that_it_is_idle(word: str, spec: str) -> None:
    assert parse_method(word).idleness(parse_format(spec), None) == []
