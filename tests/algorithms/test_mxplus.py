"""MX+ as a step: which formats it extends, with which rule, and which it refuses."""

from __future__ import annotations

import pytest

from microscale.algorithms.mxplus import MxPlus
from microscale.algorithms.pipeline import parse_method
from microscale.errors import FormatError, RecipeError
from microscale.formats import BlockFormat, Extension, ScaleRule, format_name, parse_activation, parse_format


@pytest.mark.parametrize(
    ("method", "fmt", "activations", "expected"),
    [
        ("mxplus", "mxfp4", "mxfp4", ("mxfp4_plus", "mxfp4_plus")),
        ("mxplus", "mxfp4:even", None, ("mxfp4_plus", "None")),
        ("mxplus:weights=keep", "mxfp4", "mxfp4", ("mxfp4", "mxfp4_plus")),
        ("mxplus:weights=plusplus,activations=plusplus", "mxfp6_e2m3", "mxfp4", ("mxfp6_plusplus", "mxfp4_plusplus")),
        ("mxplus", "nvfp4", "nvfp4@static", ("nvfp4_plus", "nvfp4@static")),
        ("rule+mxplus", "mxfp4", "mxfp4", ("mxfp4_plus", "mxfp4_plus")),
    ],
)
def test_mxplus_extends_formats(method: str, fmt: str, activations: str | None, expected: tuple[str, str]) -> None:
    spec = None if activations is None else parse_activation(activations)
    pipeline = parse_method(method)
    assert pipeline.refusal(parse_format(fmt), spec) is None and not pipeline.needs_calibration
    weights, inputs = pipeline.adapt(parse_format(fmt), spec)
    assert (format_name(weights), str(inputs)) == expected


def test_mxplus_refuses_in_the_words_of_the_format() -> None:
    problem = parse_method("mxplus").refusal(parse_format("int4_asym"), None)
    assert problem is not None and "step mxplus" in problem and "zero point" in problem
    with pytest.raises(RecipeError, match="weights must be one of plus, plusplus, keep"):
        parse_method("mxplus:weights=more")


@pytest.mark.parametrize(
    ("spec", "word", "rule"),
    [
        ("mxfp4:rceil", "plus", ScaleRule.FLOOR),
        ("mxfp8", "plusplus", ScaleRule.FLOOR),
        ("nvfp4:mse", "plus", ScaleRule.AMAX),
    ],
)
def test_the_rule_becomes_the_one_that_it_needs(spec: str, word: str, rule: ScaleRule) -> None:
    found, _ = MxPlus(weights=word).adapt(parse_format(spec), None)
    assert isinstance(found, BlockFormat) and (found.rule, found.extension) == (rule, Extension(word))


def test_a_finer_scale_needs_a_power_of_two() -> None:
    assert "power" in str(MxPlus(weights="plusplus").refusal(parse_format("nvfp4"), None))


@pytest.mark.parametrize("spec", ["adaptive_2_4", "segments(mxfp4*32,mxfp8*32)"])
def test_formats_of_several_parts_stay(spec: str) -> None:
    assert MxPlus().adapt(parse_format(spec), None) == (parse_format(spec), None)


def test_each_side_can_be_left() -> None:
    fmt, inputs = parse_format("int4_asym"), parse_activation("mxfp4")
    kept = MxPlus(weights="keep", activations="keep")
    assert kept.refusal(fmt, inputs) is None and kept.adapt(fmt, inputs) == (fmt, inputs)
    with pytest.raises(FormatError, match="zero point"):
        MxPlus(activations="keep").adapt(fmt, inputs)
    with pytest.raises(RecipeError, match="activations must be one of plus, plusplus, keep, got 'none'"):
        MxPlus(activations="none")
