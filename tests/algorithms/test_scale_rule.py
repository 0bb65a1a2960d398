"""The step that changes scale rules: who takes another rule, and why others keep theirs."""

from __future__ import annotations

import pytest

from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.scale_rule import ScaleRuleStep, why_not_ruled
from microscale.errors import FormatError
from microscale.formats import parse_activation, parse_format


def test_a_rule_for_one_side_is_no_idle_step() -> None:
    inputs, chain = parse_activation("mxfp4"), parse_method("rule")
    assert chain.idleness(parse_format("nvfp4"), inputs) == []
    assert len(chain.idleness(parse_format("nvfp4"), parse_activation("nvfp4"))) == 1


def test_an_unknown_rule_is_refused_for_every_format() -> None:
    for spec in ("mxfp4", "nvfp4", "mxfp4_plus"):
        with pytest.raises(FormatError, match="unknown scale rule 'thresold'"):
            parse_method("rule:weights=thresold(7)").adapt(parse_format(spec), None)


@pytest.mark.parametrize(
    ("spec", "word", "found"),
    [
        ("mxfp4", "threshold(7.25)", "mxfp4:threshold(7.25)"),
        ("mxfp4:rceil", "floor", "mxfp4"),
        ("mxfp8", "prescale(0.75)", "mxfp8:prescale(0.75)"),
        ("mxfp4+sparse1%:fp8", "mse(-1,1)", "mxfp4:mse(-1,1)+sparse1%:fp8"),
        ("mxfp4", "keep", "mxfp4"),
        ("mxfp8", "threshold(7.25)", "mxfp8"),
        ("nvfp4", "threshold(7)", "nvfp4"),
        ("mxfp4_plus", "rceil", "mxfp4_plus"),
        ("int4_asym", "rceil", "int4_asym"),
        ("adaptive_2_4", "rceil", "adaptive_2_4"),
    ],
)
def test_weights(spec: str, word: str, found: str) -> None:
    assert ScaleRuleStep(weights=word).adapt(parse_format(spec), None) == (parse_format(found), None)


@pytest.mark.parametrize(
    ("spec", "word", "found"),
    [
        ("mxfp4", "threshold(7.25)", "mxfp4:threshold(7.25)"),
        ("mxfp4", "keep", "mxfp4"),
        ("mxfp8", "ceil", "mxfp8:ceil"),
        (
            "e2m1/tensor:e8m0:rceil@static",
            "ceil",
            "e2m1/tensor:e8m0:rceil@static",
        ),  # its range was measured: no rule takes part
    ],
)
def test_inputs(spec: str, word: str, found: str) -> None:
    step = ScaleRuleStep(weights="keep", activations=word)
    fmt = parse_format("mxfp4")
    assert step.adapt(fmt, parse_activation(spec)) == (fmt, parse_activation(found))


@pytest.mark.parametrize(
    ("spec", "word", "reason"),
    [
        ("mxfp4", "keep", "keep leaves its rule as it is"),
        ("adaptive_2_4", "rceil", "it is made of several formats, each with its rule"),
        ("nvfp4", "rceil", "its block scales are no powers of two, which the rule is about"),
        ("mxfp4_plusplus", "rceil", "plusplus needs the rule that it has"),
        ("mxfp6_e2m3", "threshold(7)", "the threshold is a fact about elements of up to 4 bits"),
        ("mxfp4", "threshold(7)", None),
        ("mxfp6_e2m3", "rceil", None),
    ],
)
def test_reasons(spec: str, word: str, reason: str | None) -> None:
    assert why_not_ruled(parse_format(spec), word) == reason


def test_it_is_idle_where_neither_side_changes() -> None:
    fmt = parse_format("mxfp4:rceil")
    same = ScaleRuleStep(weights="rceil", activations="rceil")
    assert same.idleness(fmt, None) == "it has the rule rceil already"
    assert same.idleness(fmt, parse_activation("mxfp4:rceil")) == "it has the rule rceil already"
    assert same.idleness(fmt, parse_activation("mxfp4")) is None


def test_an_unknown_rule_is_an_error_for_block_formats() -> None:
    for spec in ("mxfp4", "nvfp4", "mxfp4_plus"):
        with pytest.raises(FormatError, match="unknown scale rule 'flor'"):
            why_not_ruled(parse_format(spec), "flor")
