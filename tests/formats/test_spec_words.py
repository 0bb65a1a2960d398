"""The words of a spec by themselves: what each stands for, and where a mistake in it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gfloat.formats as gf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.formats import ChannelBlock, TensorBlock, TileBlock, VectorBlock
from microscale.formats.elements import BF16, FP16, FP32, FloatElement, IntElement, SpecialValues
from microscale.formats.spec_words import SpecProblem, parse_block, parse_element, parse_number, parse_scale

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3-ieee": ml_dtypes.float8_e4m3,
    "e3m4-ieee": ml_dtypes.float8_e3m4,
}


@pytest.mark.parametrize("word", ML_DTYPES)
def test_floats_are_those_of_ml_dtypes(word: str) -> None:
    element, info = parse_element(word, 0), ml_dtypes.finfo(ML_DTYPES[word])
    assert isinstance(element, FloatElement)
    assert element.max_value == float(info.max)
    assert element.bits == info.bits and element.mantissa_bits == info.nmant
    assert 2.0 ** (1 - element.bias) == float(info.smallest_normal)


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("e2m1", gf.format_info_ocp_e2m1),
        ("e2m3", gf.format_info_ocp_e2m3),
        ("e3m2", gf.format_info_ocp_e3m2),
        ("e4m3", gf.format_info_ocp_e4m3),
        ("e5m2", gf.format_info_ocp_e5m2),
    ],
)
def test_floats_are_those_of_gfloat(word: str, other: Any) -> None:
    element = parse_element(word, 0)
    assert isinstance(element, FloatElement)
    assert (element.bits, element.bias, element.max_value) == (other.k, other.bias, other.max)


@pytest.mark.parametrize(
    ("word", "least", "largest"),
    [
        ("int4-f0", -7.0, 7.0),
        ("int4-f0-full", -8.0, 7.0),
        ("int8", -127 / 64, 127 / 64),  # OCP MX: six fraction bits
        ("int8-full", -2.0, 127 / 64),
        ("int8-f-2", -508.0, 508.0),
        ("uint4", 0.0, 15.0),
        ("uint2-f1", 0.0, 1.5),
    ],
)
def test_integers(word: str, least: float, largest: float) -> None:
    element = parse_element(word, 0)
    assert isinstance(element, IntElement)
    step = 2.0**-element.fraction_bits
    assert element.max_value == largest
    lowest = -(2 ** (element.bits - 1)) + element.symmetric if element.signed else 0
    assert lowest * step == least


def test_wide_elements_have_names() -> None:
    assert parse_element("fp16", 0) == FP16 and parse_element("bf16", 0) == BF16
    assert (
        np.finfo(np.float16).max == FP16.max_value and float(ml_dtypes.finfo(ml_dtypes.bfloat16).max) == BF16.max_value
    )


@pytest.mark.parametrize(
    ("word", "specials", "bias", "is_signed"),
    [
        ("e4m3-none", SpecialValues.NONE, 7, True),
        ("e4m3-fn-b3", SpecialValues.FN, 3, True),
        ("ue4m3-ieee-b-2", SpecialValues.IEEE, -2, False),
    ],
)
def test_floats_with_words_of_their_own(word: str, specials: SpecialValues, bias: int, is_signed: bool) -> None:
    element = parse_element(word, 0)
    assert isinstance(element, FloatElement)
    assert (element.specials, element.bias, element.signed) == (specials, bias, is_signed)


def test_blocks() -> None:
    assert parse_block("channel", 0) == ChannelBlock() and parse_block("tensor", 0) == TensorBlock()


@given(rows=st.integers(1, 2**20), cols=st.integers(1, 2**20))
def test_blocks_of_any_size(rows: int, cols: int) -> None:
    assert parse_block(str(cols), 0) == VectorBlock(cols)
    assert parse_block(f"{rows}x{cols}", 0) == TileBlock(rows, cols)


@pytest.mark.parametrize(
    ("word", "is_power_of_two", "bias", "has_second"),
    [
        ("e8m0", True, 127, False),
        ("e5m0", True, 15, False),
        ("e5m0-b3", True, 3, False),
        ("e5m0-none", False, 15, False),
        ("ue5m0", False, 15, False),
        ("e4m3+fp32", False, 7, True),
    ],
)
def test_scales(word: str, is_power_of_two: bool, bias: int, has_second: bool) -> None:
    fields = parse_scale(word, 0)
    assert fields["scale"].is_power_of_two is is_power_of_two and fields["scale"].bias == bias
    assert fields.get("tensor_scale") == (FP32 if has_second else None)


@pytest.mark.parametrize(("word", "wide"), [("fp16", FP16), ("bf16", BF16), ("fp32", FP32)])
def test_wide_scales_have_names(word: str, wide: FloatElement) -> None:
    assert parse_scale(word, 0) == {"scale": wide}


@pytest.mark.parametrize(("text", "value"), [("7.25", 7.25), ("-1", -1.0), (" 1e-3 ", 0.001)])
def test_numbers(text: str, value: float) -> None:
    assert parse_number(text, 0) == value


@pytest.mark.parametrize(
    ("parse", "word", "offset", "text"),
    [
        (parse_element, "fp32", 0, "unknown element 'fp32'"),
        (parse_element, "E2M1", 0, "unknown element 'E2M1'"),
        (parse_element, "e2m1 ", 0, "unknown element 'e2m1 '"),
        (parse_element, "uint4-full", 0, "an unsigned integer has no 'full' variant"),
        (parse_block, "x16", 0, "unknown block 'x16'"),
        (parse_block, "16x16x16", 0, "unknown block '16x16x16'"),
        (parse_scale, "int8", 0, "unknown scale 'int8'"),
        (parse_scale, "e4m3+fp16", 5, "unknown second scale 'fp16'"),
        (parse_scale, "e4m3+", 5, "unknown second scale ''"),
        (parse_number, "", 0, "'' is not a number"),
        (parse_number, "1,5", 0, "'1,5' is not a number"),
    ],
)
def test_mistakes_and_their_places(parse: Callable[[str, int], Any], word: str, offset: int, text: str) -> None:
    for start in (0, 9):
        with pytest.raises(SpecProblem) as caught:
            parse(word, start)
        assert (caught.value.offset, caught.value.text) == (start + offset, text) and caught.value.remedy


@pytest.mark.parametrize("parse", [parse_element, parse_block, parse_scale, parse_number])
@given(word=st.text(alphabet="uefmintxbp0123456789-+channeltsor. ", max_size=12))
def test_any_word_is_parsed_or_named(parse: Callable[[str, int], Any], word: str) -> None:
    try:
        found = parse(word, 3)
    except SpecProblem as problem:
        assert 3 <= problem.offset <= 3 + len(word)
    else:
        assert repr(found) == repr(parse(word, 0)), "the place is no part of the meaning"
