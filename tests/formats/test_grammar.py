"""The spec grammar: everything prints and parses back; every mistake is named with a pointer to it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from microscale.errors import FormatError, FormatSpecError
from microscale.formats import (
    NAMED_FORMATS,
    BlockFormat,
    ChannelBlock,
    Extension,
    FloatElement,
    Format,
    InfPolicy,
    IntElement,
    NaNPolicy,
    Overflow,
    PairFormat,
    Rounding,
    RuleKind,
    ScaleRule,
    SparseElement,
    SparseTable,
    SpecialValues,
    SubScale,
    SubScaleKind,
    TensorBlock,
    TileBlock,
    VectorBlock,
    ZeroPoint,
    format_name,
    parse_format,
    power_of_two_scale,
    spec_text,
    uint_element,
)
from microscale.formats import grammar as grammar_module
from microscale.formats.elements import BF16, E4M3, E8M0, FP16, FP32

# ----------------------------------------------------------------------------------- any valid record, at random


@st.composite
def float_elements(draw: st.DrawFn, max_bits: int = 19) -> FloatElement:
    exponent_bits = draw(st.integers(0, 8))
    mantissa_bits = draw(st.integers(0, 10))
    default = 2 ** (exponent_bits - 1) - 1 if exponent_bits else 0
    try:
        element = FloatElement(
            exponent_bits=exponent_bits,
            mantissa_bits=mantissa_bits,
            bias=default + draw(st.sampled_from([0, 0, 0, 1, -1, 5, 13, -20])),
            specials=draw(st.sampled_from(SpecialValues)),
            signed=draw(st.booleans()),
        )
    except FormatError:
        assume(False)
        raise AssertionError from None
    assume(element.bits <= max_bits)
    return element


@st.composite
def int_elements(draw: st.DrawFn) -> IntElement:
    is_signed = draw(st.booleans())
    return IntElement(
        bits=draw(st.integers(2, 8)),
        fraction_bits=draw(st.integers(-3, 9)),
        signed=is_signed,
        symmetric=is_signed and draw(st.booleans()),
    )


blocks = st.one_of(
    st.integers(1, 300).map(VectorBlock),
    st.sampled_from([VectorBlock(16), VectorBlock(32), VectorBlock(64)]),
    st.tuples(st.integers(1, 64), st.integers(1, 64)).map(lambda pair: TileBlock(*pair)),
    st.just(ChannelBlock()),
    st.just(TensorBlock()),
)
power_of_two_scales = st.one_of(
    st.just(E8M0), st.builds(power_of_two_scale, st.integers(1, 7), bias=st.one_of(st.none(), st.integers(1, 60)))
)
scales = st.one_of(power_of_two_scales, float_elements(max_bits=8), st.sampled_from([FP16, BF16, FP32]))
positive = st.floats(1e-6, 1e6)
power_of_two_rules = st.one_of(
    st.sampled_from([ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.RCEIL, ScaleRule.EVEN]),
    st.integers(0, 23).map(lambda bits: ScaleRule(RuleKind.EVEN, (float(bits),))),
    positive.map(ScaleRule.threshold),
    st.floats(0.01, 1).map(ScaleRule.prescale),
    positive.map(ScaleRule.std),
    st.tuples(st.integers(-3, 0), st.integers(0, 3)).map(lambda window: ScaleRule.mse(*window)),
    st.floats(0.01, 100).map(ScaleRule.percentile),
)
float_scale_rules = st.one_of(
    st.sampled_from([ScaleRule.AMAX, ScaleRule.RCEIL]),
    positive.map(ScaleRule.threshold),
    positive.map(ScaleRule.std),
    st.tuples(st.floats(0.01, 0.9), st.floats(0.9, 2)).map(lambda window: ScaleRule.mse(*window)),
    st.floats(0.01, 100).map(ScaleRule.percentile),
)
sparse_tables = st.builds(SparseTable, percent=st.floats(1e-9, 100), element=st.sampled_from(SparseElement))


@st.composite
def block_formats(draw: st.DrawFn, block: Any = blocks, inside_pair: bool = False) -> BlockFormat:
    """Any record that BlockFormat accepts, every option included; the parts are chosen so that most draws fit."""
    scale: FloatElement = draw(scales)
    element = draw(st.one_of(float_elements(), int_elements()))
    level = draw(st.sampled_from(["plain", "plain", "plus", "sub", "asym"]))
    fields: dict[str, Any] = {"element": element, "block": draw(block), "scale": scale}
    fields["rule"] = draw(power_of_two_rules if scale.is_power_of_two else float_scale_rules)
    fields["nan_policy"] = NaNPolicy.RAISE if scale.nan_code is None else draw(st.sampled_from(NaNPolicy))
    fields["inf_policy"] = InfPolicy.AS_NAN if inside_pair else draw(st.sampled_from(InfPolicy))
    if level in ("plain", "sub") and isinstance(element, FloatElement) and element.nan_code is not None:
        fields["overflow"] = draw(st.sampled_from(Overflow))
    if level == "plus":
        powers = [Extension.PLUS, Extension.PLUSPLUS] if scale.is_power_of_two else [Extension.PLUS]
        fields["extension"] = draw(st.sampled_from(powers))
        fields["rule"] = ScaleRule.FLOOR if scale.is_power_of_two else ScaleRule.AMAX
        if isinstance(fields["block"], TileBlock | ChannelBlock | TensorBlock):
            fields["block"] = VectorBlock(32)
    if level == "sub":
        size = draw(st.sampled_from([4, 8] if inside_pair else list(range(1, 17))))
        fields["sub_scale"] = SubScale(
            size=size, bits=draw(st.integers(1, 8)), kind=draw(st.sampled_from(SubScaleKind))
        )
        if not inside_pair:
            fields["block"] = VectorBlock(size * draw(st.integers(2, 9)))
    if level == "asym":
        fields["element"] = uint_element(draw(st.integers(2, 8)))
        fields["zero_point"] = draw(st.sampled_from(ZeroPoint))
        fields["rule"] = ScaleRule.MINMAX
        fields["scale"] = draw(st.sampled_from([FP16, BF16, FP32, E4M3]))
        fields["nan_policy"] = draw(st.sampled_from(NaNPolicy))
    if not inside_pair:
        is_narrow = not fields["scale"].is_power_of_two and fields["scale"].exponent_bits < 8
        if is_narrow and not isinstance(fields["block"], TensorBlock):
            fields["tensor_scale"] = draw(st.sampled_from([None, FP32]))
        fields["sparse"] = draw(st.one_of(st.none(), sparse_tables))
    fields["rounding"] = draw(st.sampled_from(Rounding))
    if fields["rounding"] is Rounding.STOCHASTIC:
        fields["seed"] = draw(st.integers(0, 2**70))
    try:
        return BlockFormat(**fields)
    except FormatError:
        assume(False)
        raise AssertionError from None


@st.composite
def pair_formats(draw: st.DrawFn) -> PairFormat:
    size = draw(st.sampled_from([16, 32, 48]))
    one, other = (draw(block_formats(block=st.just(VectorBlock(size)), inside_pair=True)) for _ in range(2))
    low, high = sorted((one, other), key=lambda part: part.element.bits)
    try:
        return PairFormat(
            low=low,
            high=high,
            high_percent=draw(st.floats(0, 100)),
            sparse=draw(st.one_of(st.none(), sparse_tables)),
        )
    except FormatError:
        assume(False)
        raise AssertionError from None


RANDOM_RECORDS = settings(
    max_examples=300, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None
)


@RANDOM_RECORDS
@given(block_formats())
def test_block_formats_print_and_parse_back(fmt: BlockFormat) -> None:
    text = spec_text(fmt)
    assert parse_format(text) == fmt, text
    assert parse_format(format_name(fmt)) == fmt
    assert spec_text(parse_format(text)) == text


@settings(RANDOM_RECORDS, max_examples=100)
@given(pair_formats())
def test_pair_formats_print_and_parse_back(fmt: PairFormat) -> None:
    text = spec_text(fmt)
    assert parse_format(text) == fmt, text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="e0123456789m/:+-_.%()pairsntubfloxcdqwyvkhgz ,", max_size=40))
def test_any_text_parses_or_raises_our_error(text: str) -> None:
    try:
        fmt = parse_format(text)
    except FormatSpecError as error:
        assert 0 <= error.position <= len(error.spec)
    else:
        assert parse_format(spec_text(fmt)) == fmt


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_specs_parse_or_raise_our_error(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from([spec_text(named.format) for named in NAMED_FORMATS.values()] + list(EXAMPLES)))
    place = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 3))
    damaged = (
        text[:place]
        + data.draw(st.sampled_from(["", "0", "9", "(", ")", ":", "-", "+", "x", "%"]))
        + text[place + length :]
    )
    try:
        fmt = parse_format(damaged)
    except FormatSpecError as error:
        assert 0 <= error.position <= len(error.spec)
    else:
        assert parse_format(spec_text(fmt)) == fmt


# ------------------------------------------------------------------------------------------------ words and defaults

EXAMPLES = {
    # spec: canonical spec
    "e3m2/32:e8m0:rceil": "e3m2/32:e8m0:rceil",
    "e2m1/16:e4m3+fp32": "e2m1/16:e4m3+fp32:amax",
    "int3/64:fp16:asym": "int3/64:fp16:asym",
    "mxfp4:even": "e2m1/32:e8m0:even",
    "mxfp4+sparse0.5%:fp8": "e2m1/32:e8m0:floor+sparse0.5%:fp8",
    " mxfp4 ": "e2m1/32:e8m0:floor",
    "e2m1/32:e8m0": "e2m1/32:e8m0:floor",
    "e2m3/32:e8m0": "e2m3/32:e8m0:floor",
    "e3m2/32:e8m0": "e3m2/32:e8m0:floor",
    "e4m3/32:e8m0": "e4m3/32:e8m0:rceil",
    "e5m2/32:e8m0": "e5m2/32:e8m0:rceil",
    "int4/32:e8m0": "int4/32:e8m0:rceil",
    "int8/32:e8m0": "int8/32:e8m0:rceil",
    "fp16/32:e8m0": "fp16/32:e8m0:rceil",
    "e4m3/32:e8m0:plus": "e4m3/32:e8m0:floor:plus",
    "int8/32:e8m0:plusplus": "int8/32:e8m0:floor:plusplus",
    "mxfp8:plus": "e4m3/32:e8m0:floor:plus",
    "mxint8:plusplus": "int8/32:e8m0:floor:plusplus",
    "nvfp4:plus": "e2m1/16:e4m3+fp32:amax:plus",
    "e4m3/channel:fp32": "e4m3/channel:fp32:amax",
    "int8/tensor:bf16": "int8/tensor:bf16:amax",
    "int4/128x128:fp16": "int4/128x128:fp16:amax",
    "mxfp4:mse": "e2m1/32:e8m0:mse(-1,1)",
    "nvfp4:mse": "e2m1/16:e4m3+fp32:mse(0.5,1)",
    "mxfp4:std": "e2m1/32:e8m0:std(2.92247856)",
    "mxfp4:prescale": "e2m1/32:e8m0:prescale(0.75)",
    "mxfp4:threshold(7.25)": "e2m1/32:e8m0:threshold(7.25)",
    "mxfp8:even(1)": "e4m3/32:e8m0:even(1)",
    "mxfp4:stochastic": "e2m1/32:e8m0:floor:stochastic(0)",
    "mxfp4:stochastic(42)": "e2m1/32:e8m0:floor:stochastic(42)",
    "mxfp4:stochastic(42):nearest_even": "e2m1/32:e8m0:floor",
    "mxfp4:toward_zero:nan_raise:inf_saturate": "e2m1/32:e8m0:floor:toward_zero:nan_raise:inf_saturate",
    "mxfp8:nonfinite": "e4m3/32:e8m0:rceil:nonfinite",
    "int4/64:fp16:asym(int)": "int4/64:fp16:asym",
    "uint4/64:fp16:asym(fp8)": "int4/64:fp16:asym(fp8)",
    "e2m1/32:e8m0:sub(8, 2, linear)": "e2m1/32:e8m0:floor:sub(8,2,linear)",
    "e2m1/16:e4m3-none:nan_raise": "e2m1/16:e4m3-none:amax",
    "e2m1/16:ue5m3": None,  # no NaN code: see test_scales_without_a_nan_code_raise_by_default
    "pair(int2/32:fp16:asym,mxfp4,50%)": "pair(int2/32:fp16:asym,e2m1/32:e8m0:floor,50%)",
    "pair(mxfp4,mxfp8,12.5%)+sparse1%:fp16": "pair(e2m1/32:e8m0:floor,e4m3/32:e8m0:rceil,12.5%)+sparse1%:fp16",
    "adaptive_2_4+sparse1%:fp8": "pair(int2/32:fp16:asym,int4/32:fp16:asym,50%)+sparse1%:fp8",
}


@pytest.mark.parametrize("spec", [spec for spec, text in EXAMPLES.items() if text])
def test_words_and_defaults(spec: str) -> None:
    fmt = parse_format(spec)
    assert spec_text(fmt) == EXAMPLES[spec]
    assert parse_format(spec_text(fmt)) == fmt


def test_the_examples_of_the_module_docstring_parse() -> None:
    text = (grammar_module.__doc__ or "").split("Examples:")[1].split("Defaults")[0]
    examples = re.findall(r"``([^`]+)``", text)
    assert len(examples) >= 5
    for example in examples:
        parse_format(example)


def test_scales_without_a_nan_code_raise_by_default() -> None:
    fmt = parse_format("e2m1/16:e4m3-none")
    assert isinstance(fmt, BlockFormat) and fmt.nan_policy is NaNPolicy.RAISE
    with pytest.raises(FormatSpecError, match="nan_raise"):
        parse_format("e2m1/16:e4m3-none:nan_poison")


def test_scales_with_zero_mantissa_bits() -> None:
    """eXm0 is a power of two with NaN and no zero; with explicit specials it is a float with zero."""
    power = parse_format("e2m1/32:e5m0")
    with_zero = parse_format("e2m1/32:e5m0-none:nan_raise")
    assert isinstance(power, BlockFormat) and isinstance(with_zero, BlockFormat)
    assert power.scale.is_power_of_two and not with_zero.scale.is_power_of_two
    assert power.rule == ScaleRule.FLOOR and with_zero.rule == ScaleRule.AMAX
    assert spec_text(with_zero) == "e2m1/32:e5m0-none:amax"


def test_every_option_word_of_the_records_is_in_the_grammar() -> None:
    base = parse_format("e4m3/32:e8m0")
    assert isinstance(base, BlockFormat)
    for word, change in {
        **{policy.value: {"nan_policy": policy} for policy in NaNPolicy},
        **{policy.value: {"inf_policy": policy} for policy in InfPolicy},
        **{policy.value: {"overflow": policy} for policy in Overflow},
        **{rounding.value: {"rounding": rounding} for rounding in Rounding},
    }.items():
        assert parse_format(f"e4m3/32:e8m0:{word}") == dataclasses.replace(base, **change)


# ----------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "spec, position, problem, remedy",
    [
        ("", 0, "empty format", "known names"),
        ("   ", 0, "empty format", "known names"),
        ("mxfp5", 0, "unknown format 'mxfp5'", "mxfp4"),
        ("mxfp5:even", 0, "unknown format 'mxfp5'", "ELEMENT/BLOCK:SCALE"),
        ("e2m1/32", 7, "scale is missing", "e8m0"),
        ("x2m1/32:e8m0", 0, "unknown element 'x2m1'", "eXmY"),
        ("e2/32:e8m0", 0, "unknown element 'e2'", "eXmY"),
        ("/32:e8m0", 0, "unknown element ''", "eXmY"),
        ("e9m1/32:e8m0", 0, "exponent bits, got 9", "E 0-8"),
        ("e2m11/32:e8m0", 0, "mantissa bits, got 11", "M 0-10"),
        ("e0m0/32:e8m0", 0, "e0m0", "eXmY"),
        ("e3m0-ieee/32:e8m0", 0, "IEEE", "eXmY"),
        ("e2m1-b500/32:e8m0", 0, "float32", "eXmY"),
        ("e4m3-b3-b5/32:e8m0", 0, "unknown element", "eXmY"),
        ("e4m3-fn-ieee/32:e8m0", 0, "unknown element", "eXmY"),
        ("int9/32:e8m0", 0, "2 to 8 bits, got 9", "intN"),
        ("int4-f99/32:e8m0", 0, "fraction bits, got 99", "intN"),
        ("int4-f3-f5/32:e8m0", 0, "unknown element", "intN"),
        ("int4-full-full/32:e8m0", 0, "unknown element", "intN"),
        ("uint4-full/32:e8m0", 0, "unsigned", "intN"),
        ("e8m23/32:e8m0", 0, "a scale, not an element", "docs/reference/formats.md"),
        ("e2m1/0:e8m0", 5, "at least one element, got 0", "a size"),
        ("e2m1/0x4:e8m0", 5, "at least one element, got 0x4", "16x16"),
        ("e2m1/row:e8m0", 5, "unknown block 'row'", "channel"),
        ("e2m1/:e8m0", 5, "unknown block ''", "channel"),
        ("e2m1/-4:e8m0", 5, "unknown block '-4'", "channel"),
        ("e2m1/32:e9m0", 8, "exponent bits, got 9", "e8m0"),
        ("e2m1/32:8", 8, "unknown scale '8'", "fp16"),
        ("e2m1/32:", 8, "unknown scale ''", "fp16"),
        ("e2m1/32:e4m3+fp16", 13, "unknown second scale 'fp16'", "+fp32"),
        ("e2m1/32:e8m0+fp32", 0, "second scale per tensor", "docs/reference/formats.md"),
        ("e2m1/32:e8m0:sideways", 13, "unknown option 'sideways'", "toward_zero"),
        ("e2m1/32:e8m0:", 13, "cannot read option ''", "toward_zero"),
        ("mxfp4:even:Round!", 11, "cannot read option 'Round!'", "toward_zero"),
        ("mxfp4:floor(3)", 6, "takes 0 arguments, got 1", "threshold"),
        ("mxfp4:threshold", 6, "takes 1 argument, got 0", "threshold"),
        ("mxfp4:threshold(seven)", 6, "'seven' is not a number", "decimal"),
        ("mxfp4:threshold()", 6, "'' is not a number", "decimal"),
        ("mxfp4:threshold(-7)", 6, "positive", "threshold"),
        ("mxfp4:prescale(2)", 6, "(0, 1]", "prescale"),
        ("mxfp4:even(1.5)", 6, "whole number", "e.g."),
        ("mxfp4:mse(1,-1)", 6, "low <= high", "mse"),
        ("mxfp4:mse(-1.5,1)", 0, "whole", "docs/reference/formats.md"),
        ("mxfp4:percentile(101)", 6, "(0, 100]", "percentile"),
        ("mxfp4:amax", 0, "amax does not fit scale e8m0", "docs/reference/formats.md"),
        ("nvfp4:floor", 0, "floor does not fit scale e4m3", "docs/reference/formats.md"),
        ("mxfp4:minmax", 0, "zero point", "docs/reference/formats.md"),
        ("mxfp4:plus:rceil", 0, "need rule floor, not rceil", "docs/reference/formats.md"),
        ("nvfp4:plusplus", 0, "plusplus lowers a power-of-two scale", "docs/reference/formats.md"),
        ("int4/64:fp16:asym(bf16)", 13, "unknown zero point 'bf16'", "asym(fp8)"),
        ("mxfp4:asym", 0, "zero point", "docs/reference/formats.md"),
        ("mxfp4:nonfinite", 0, "neither Inf nor NaN", "docs/reference/formats.md"),
        ("mxfp4:stochastic(-1)", 6, "whole number", "stochastic(42)"),
        ("mxfp4:stochastic(x)", 6, "whole number", "stochastic(42)"),
        ("mxfp4:sub(8,2)", 6, "cannot read sub(8,2)", "sub(8,2,linear)"),
        ("mxfp4:sub(8,9,linear)", 6, "1 to 8 bits, got 9", "sub(8,2,linear)"),
        ("mxfp4:sub(7,2,linear)", 0, "divide", "docs/reference/formats.md"),
        ("mxfp4+sparse0.5%", 5, "cannot read '+sparse0.5%'", "+sparse0.5%:fp8"),
        ("mxfp4+sparse0.5%:bf16", 5, "cannot read", "+sparse0.5%:fp8"),
        ("mxfp4+sparse0%:fp8", 12, "more than 0", "+sparse0.5%:fp8"),
        ("mxfp4+sparse200%:fp8", 12, "at most 100", "+sparse0.5%:fp8"),
        ("mxfp4+sparse1.2.3%:fp8", 12, "'1.2.3' is not a number", "decimal"),
        ("pair(mxfp4,mxfp8,50%", 20, "not closed", "pair(LOW,HIGH,PERCENT%)"),
        ("pair(mxfp4,mxfp8)", 5, "two formats and a percentage, got 2", "pair(LOW,HIGH,PERCENT%)"),
        ("pair(mxfp4,mxfp8,50)", 5, "two formats and a percentage", "pair(LOW,HIGH,PERCENT%)"),
        ("pair(mxfp4,mxfp9,50%)", 11, "unknown format 'mxfp9'", "known names"),
        ("pair(mxfp4,mxfp8:oops,50%)", 17, "unknown option 'oops'", "toward_zero"),
        ("pair(mxfp4,mxfp8,x%)", 17, "'x' is not a number", "decimal"),
        ("pair(mxfp4,mxfp8,150%)", 0, "0 to 100 percent, got 150", "pair(LOW,HIGH,PERCENT%)"),
        ("pair(mxfp8,mxfp4,50%)", 0, "narrower", "pair(LOW,HIGH,PERCENT%)"),
        ("pair(mxfp4,nvfp4,50%)", 0, "per-tensor scale", "pair(LOW,HIGH,PERCENT%)"),
        ("pair(mxfp4,adaptive_2_4,50%)", 11, "a pair inside a pair", "pair(LOW,HIGH,PERCENT%)"),
        ("adaptive_2_4:even", 13, "takes no options", "pair(LOW,HIGH,PERCENT%)"),
    ],
)
def test_mistakes_are_named_with_a_pointer(spec: str, position: int, problem: str, remedy: str) -> None:
    with pytest.raises(FormatSpecError) as caught:
        parse_format(spec)
    error, lines = caught.value, str(caught.value).splitlines()
    assert problem in lines[0], lines[0]
    assert error.position == position, (error.position, str(error))
    assert remedy in "\n".join(lines[3:]), str(error)
    assert lines[1] == f"  {spec.strip()}" and lines[2] == "  " + " " * position + "^"
    assert isinstance(error, FormatError) and isinstance(error, ValueError)


def test_format_is_a_union_of_both_records() -> None:
    assert isinstance(parse_format("mxfp4"), Format) and isinstance(parse_format("adaptive_2_4"), Format)
