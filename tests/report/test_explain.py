"""Formats in words: every fact that the record holds, nothing about parts that it does not have."""

from __future__ import annotations

import pytest

from microscale.errors import FormatSpecError
from microscale.formats import NAMED_FORMATS, RuleKind, parse_format, spec_text
from microscale.report.explain import explain_format, formats_table_rows

COMMON = {"element", "block", "scale", "scale rule", "rounding", "overflow", "NaN", "Inf", "spec", "bits per value"}


def test_mxfp4_in_words() -> None:
    facts = dict(explain_format("mxfp4"))
    assert facts["name"] == "mxfp4 (MXFP4)"
    assert facts["bits per value"] == "4.25"
    assert facts["element"].startswith(
        "e2m1: 4 bits (1 sign, 2 exponent, 1 mantissa; bias 1); smallest 0.5, largest 6;"
    )
    assert facts["scale"] == "e8m0: 8 bits, powers of two from 2^-127 to 2^127"
    assert facts["source"] == "OCP MX v1.0"
    assert facts["spec"] == "e2m1/32:e8m0:floor"
    assert set(facts) == COMMON | {"name", "what it is", "source"}


def test_an_unnamed_format_has_neither_name_nor_source() -> None:
    facts = dict(explain_format("mxfp4:threshold(7.25):stochastic(42):nan_raise:inf_saturate"))
    assert set(facts) == COMMON
    assert facts["scale rule"].startswith("threshold(7.25): 2^ceil(log2(amax / 7.25))")
    assert facts["rounding"] == "stochastic, seed 42"
    assert facts["NaN"] == "NonFiniteError"
    assert facts["Inf"] == "as the largest float32"


@pytest.mark.parametrize(
    ("spec", "label", "part"),
    [
        ("mxfp4_plus", "largest element", "4 * (1 + f / 8); its index takes 8 bits"),
        ("nvfp4_plus", "largest element", "its index takes 4 bits"),
        ("mxfp8_plusplus", "largest element", "256 * (1 + f / 128); its index takes 8 bits a block, 3 of which"),
        ("int4_asym", "zero point", "an integer of 4 bits"),
        ("int4_asym_fp8", "zero point", "an E4M3 number"),
        ("mxfp4:sub(8,2,linear)", "sub-group scale", "2 bits for each 8 elements; code k multiplies"),
        ("mxfp4:sub(8,2,linear)", "sub-group scale", "(k + 1) / 4"),
        ("mxfp4:sub(8,3,pow2)", "sub-group scale", "2^-k"),
        ("mxfp4_sparse", "sparse table", "the 0.5 % largest of the tensor, in fp8"),
        ("nvfp4", "scale", "one more fp32 scale for the whole tensor"),
        ("mxfp4:even", "scale rule", "to 1 mantissa bits"),
        ("mxfp8:even(1)", "scale rule", "to 1 mantissa bits"),
        ("mxint8", "element", "signed, 6 of them fraction; -1.984375 to 1.984375 in steps of 0.015625"),
        ("int4-full/16x16:fp32", "element", "-2 to 1.75"),
        ("int4-full/16x16:fp32", "block", "a tile of 16 rows and 16 columns"),
        ("e5m2/channel:fp32:nonfinite", "overflow", "becomes Inf or NaN"),
        ("e5m2/tensor:fp32", "block", "the whole tensor"),
        ("e5m2/32:e8m0", "element", "smallest 2^-16, largest 57344; Inf and NaN"),
        ("adaptive_2_4", "narrow element", "uint2"),
        ("adaptive_2_4", "wide element", "uint4"),
    ],
)
def test_each_part_is_explained(spec: str, label: str, part: str) -> None:
    assert part in dict(explain_format(spec))[label]


def test_every_rule_has_a_sentence_wherever_it_is_allowed() -> None:
    rules = {
        "e8m0": ("floor", "ceil", "rceil", "even", "threshold(7)", "prescale", "std", "mse", "percentile(99)"),
        "fp16": ("amax", "rceil", "threshold(7)", "std", "mse", "percentile(99)"),
    }
    seen = {RuleKind.MINMAX.value}
    for scale, words in rules.items():
        for word in words:
            text = dict(explain_format(f"e2m1/32:{scale}:{word}"))["scale rule"]
            assert "{" not in text
            seen.add(word.partition("(")[0])
    assert seen == {kind.value for kind in RuleKind}


def test_every_named_format_is_explained_and_its_spec_parses_back() -> None:
    for name, named in NAMED_FORMATS.items():
        facts = dict(explain_format(name))
        assert facts["spec"] == spec_text(named.format)
        assert parse_format(facts["spec"]) == named.format
        assert all(facts.values())


def test_an_unknown_name_raises() -> None:
    with pytest.raises(FormatSpecError, match="mxfp5"):
        explain_format("mxfp5")


def test_the_table_has_one_row_for_each_named_format() -> None:
    rows = formats_table_rows()
    assert [row.name for row in rows] == list(NAMED_FORMATS)
    by_name = {row.name: row for row in rows}
    nvfp4 = by_name["nvfp4_plus"]
    assert (nvfp4.title, nvfp4.bits_per_value, nvfp4.largest, nvfp4.block) == ("NVFP4+", 4.75, "6", "16")
    assert (nvfp4.scale, nvfp4.rule) == ("e4m3+fp32", "amax plus")
    assert by_name["adaptive_2_4"].largest == "3 / 15"
    assert by_name["adaptive_2_4"].scale == "fp16"
