"""Element records: decode tables against the specification, ml_dtypes, gfloat and an exact oracle; validation."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

from format_specs import block_format
from microscale.errors import FormatError
from microscale.formats import (
    NAMED_ELEMENTS,
    Element,
    FloatElement,
    IntElement,
    SpecialValues,
    float_element,
    int_element,
    power_of_two_scale,
    uint_element,
)
from microscale.formats.codec import decode, value_table
from microscale.formats.elements import BF16, E8M0, FP16, FP32
from vectors import exact

OCP = json.loads((Path(__file__).parents[1] / "vectors" / "ocp_tables.json").read_text())

ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}
GFLOAT = {
    "e2m1": gfloat.formats.format_info_ocp_e2m1,
    "e2m3": gfloat.formats.format_info_ocp_e2m3,
    "e3m2": gfloat.formats.format_info_ocp_e3m2,
    "e4m3": gfloat.formats.format_info_ocp_e4m3,
    "e5m2": gfloat.formats.format_info_ocp_e5m2,
    "e8m0": gfloat.formats.format_info_ocp_e8m0,
    "int8": gfloat.formats.format_info_ocp_int8,
    "bf16": gfloat.formats.format_info_bfloat16,
    "fp16": gfloat.formats.format_info_binary16,
}
GENERIC = (
    *("e3m0", "e1m0", "e1m3", "e4m1", "e5m3", "e6m4", "e5m6-b20", "e2m1-b5", "e4m3-b140", "e4m3-b-100"),
    *("e4m3-ieee", "e4m3-none", "e5m2-fn", "e5m2-none", "e2m1-ieee", "e3m1-fn", "e0m3-fn", "e8m2-b140"),
    *("ue4m3", "ue5m3", "ue2m1", "ue4m4-none", "int4-full", "int8-full", "int8-f0", "int4-f-3", "uint4", "uint8-f3"),
)


def element_of(word: str) -> Element:
    """An element by its word, through the grammar."""
    if word == "e8m0":
        return E8M0
    return block_format(f"{word}/32:fp32").element


def assert_same_numbers(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, any NaN being the same NaN."""
    with np.errstate(invalid="ignore"):  # signalling NaN codes of fp16 and bf16
        got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), is_nan)
    np.testing.assert_array_equal(got[~is_nan].view(np.int64), expected[~is_nan].view(np.int64))


@pytest.mark.parametrize("word", [*NAMED_ELEMENTS, "e8m0", *GENERIC])
def test_every_code_decodes_to_the_value_of_its_fields(word: str) -> None:
    element = element_of(word)
    codes = range(2**element.bits)
    expected = np.array([exact.decode(element, code) for code in codes])
    assert_same_numbers(value_table(element).numpy(), expected)
    if element.bits <= 8:
        assert_same_numbers(np.array([element.value(code) for code in codes]), expected)


@pytest.mark.parametrize("word", ML_DTYPES)
def test_every_code_against_ml_dtypes(word: str) -> None:
    element = element_of(word)
    storage = np.uint8 if element.bits <= 8 else np.uint16
    codes = np.arange(2**element.bits).astype(storage)
    expected = codes.view(ML_DTYPES[word]).astype(np.float32)
    assert_same_numbers(decode(torch.from_numpy(codes.astype(np.int32)), element).numpy(), expected)


@pytest.mark.parametrize("word", GFLOAT)
def test_every_code_against_gfloat(word: str) -> None:
    element = element_of(word)
    codes = np.arange(2**element.bits)
    expected = gfloat.decode_ndarray(GFLOAT[word], codes)
    assert_same_numbers(decode(torch.from_numpy(codes.astype(np.int32)), element).numpy(), expected)


def test_every_code_against_the_shared_tables(shared_dir: Path) -> None:
    tables: dict[str, Any] = json.loads((shared_dir / "vectors" / "ocp_decode_tables.json").read_text())
    words = {"e4m3fn": "e4m3"}
    seen = 0
    for name, rows in tables.items():
        if not isinstance(rows, list):
            continue
        expected = np.array([math.nan if "nan" in str(row) else float.fromhex(str(row)) for row in rows])
        assert_same_numbers(value_table(element_of(words.get(name, name))).numpy(), expected)
        seen += 1
    assert seen >= 6


@pytest.mark.parametrize("word", OCP["elements"])
def test_float_elements_by_the_numbers_of_the_specification(word: str) -> None:
    row, element = OCP["elements"][word], NAMED_ELEMENTS[word]
    assert isinstance(element, FloatElement)
    assert (element.bits, element.bias) == (row["bits"], row["bias"])
    assert element.max_value == row["max_normal"] == element.value(int(row["max_normal_code"], 16))
    assert element.max_code == int(row["max_normal_code"], 16)
    assert element.min_normal == 2.0 ** row["min_normal_log2"] == element.value(int(row["min_normal_code"], 16))
    max_subnormal = element.value(int(row["min_normal_code"], 16) - 1)
    assert max_subnormal == float(Fraction(row["max_subnormal_over_min_normal"]) * Fraction(element.min_normal))
    assert element.min_value == 2.0 ** row["min_subnormal_log2"] == element.value(1)
    codes = range(2**element.bits)
    assert [code for code in codes if math.isnan(element.value(code))] == [int(c, 16) for c in row["nan_codes"]]
    assert [code for code in codes if math.isinf(element.value(code))] == [int(c, 16) for c in row["inf_codes"]]
    assert element.nan_code is None if not row["nan_codes"] else f"{element.nan_code:#04x}" in row["nan_codes"]
    assert element.inf_code == (int(row["inf_codes"][0], 16) if row["inf_codes"] else None)


@pytest.mark.parametrize("word", OCP["values"])
def test_small_elements_value_by_value(word: str) -> None:
    values = OCP["values"][word]
    element = NAMED_ELEMENTS[word]
    assert_same_numbers(value_table(element).numpy(), np.array([*values, *(-float(v) for v in values)]))


def test_int8_by_the_numbers_of_the_specification() -> None:
    row, element = OCP["int8"], NAMED_ELEMENTS["int8"]
    assert isinstance(element, IntElement)
    assert (element.bits, element.max_value, element.min_value) == (row["bits"], row["max"], row["smallest"])
    assert element.value(int(row["max_code"], 16)) == row["max"]
    assert element.value(int(row["smallest_code"], 16)) == row["smallest"]
    assert element.value(int(row["most_negative_code"], 16)) == row["most_negative"]
    assert element.value(int(row["minus_two_code"], 16)) == -2.0
    assert element.min_code == -127  # the code of -2 is read but never written
    assert element.max_exponent == 0


def test_e8m0_by_the_numbers_of_the_specification() -> None:
    row = OCP["e8m0"]
    assert (E8M0.bits, E8M0.bias, E8M0.signed, E8M0.subnormals) == (row["bits"], row["bias"], False, False)
    assert E8M0.value(int(row["min_code"], 16)) == E8M0.min_value == 2.0 ** row["min_log2"]
    assert E8M0.value(int(row["max_code"], 16)) == E8M0.max_value == 2.0 ** row["max_log2"]
    assert E8M0.max_code == int(row["max_code"], 16) and E8M0.nan_code == int(row["nan_code"], 16)
    assert E8M0.inf_code is None and E8M0.is_power_of_two
    assert all(E8M0.value(code) == 2.0 ** (code - 127) for code in range(255))


@pytest.mark.parametrize("word, e_max", [("e4m3", 8), ("e5m2", 15), ("e2m3", 2), ("e3m2", 4), ("e2m1", 2), ("int8", 0)])
def test_max_exponent_is_e_max_of_the_ocp_scale_rule(word: str, e_max: int) -> None:
    assert NAMED_ELEMENTS[word].max_exponent == e_max


@pytest.mark.parametrize("word", [*NAMED_ELEMENTS, "e8m0", *GENERIC])
def test_properties_follow_from_the_values(word: str) -> None:
    element = element_of(word)
    values = [exact.decode(element, code) for code in range(2**element.bits)]
    finite = [v for v in values if math.isfinite(v)]
    assert element.max_value == max(finite)
    assert element.min_value == min(v for v in finite if v > 0)
    assert element.max_exponent == exact.floor_log2(Fraction(max(finite)))
    if isinstance(element, FloatElement):
        assert element.value(element.max_code) == max(finite)
        assert element.min_exponent == exact.floor_log2(Fraction(element.min_value))
        assert (element.nan_code is None) == (not any(math.isnan(v) for v in values))
        assert (element.inf_code is None) == (not any(math.isinf(v) for v in values))
        if element.nan_code is not None:
            assert math.isnan(element.value(element.nan_code))
        if element.inf_code is not None:
            assert element.value(element.inf_code) == math.inf


@pytest.mark.parametrize(
    "element, bits",
    [(FP16, 16), (BF16, 16), (FP32, 32), (E8M0, 8), (power_of_two_scale(5), 8), (float_element(4, 3), 8)],
)
def test_bits_stored(element: FloatElement, bits: int) -> None:
    assert element.bits_stored == bits


@pytest.mark.parametrize("word", [*NAMED_ELEMENTS, *GENERIC])
def test_the_name_parses_back(word: str) -> None:
    element = element_of(word)
    assert element_of(element.name) == element
    assert element.name == word  # all words above are canonical


def test_canonical_names_drop_what_is_default() -> None:
    assert element_of("e4m3-fn-b7").name == "e4m3"
    assert element_of("e5m2-ieee").name == "e5m2"
    assert element_of("int8-f6").name == "int8"
    assert element_of("uint4-f0").name == "uint4"
    assert float_element(5, 10).name == "fp16" and float_element(8, 7).name == "bf16" and FP32.name == "fp32"
    assert power_of_two_scale(8).name == "e8m0" and power_of_two_scale(5, bias=20).name == "e5m0-b20"


_VALID_FLOAT: dict[str, Any] = {"exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "specials": SpecialValues.FN}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"exponent_bits": 9}, ("0 to 8 exponent bits", "got 9")),
        ({"exponent_bits": -1}, ("exponent bits", "got -1")),
        ({"mantissa_bits": 11}, ("0 to 10 mantissa bits", "got 11")),
        ({"mantissa_bits": 23}, ("mantissa bits", "got 23")),
        ({"exponent_bits": 0, "mantissa_bits": 0}, ("at least one", "e0m0")),
        ({"exponent_bits": 3, "mantissa_bits": 0, "specials": SpecialValues.IEEE}, ("IEEE", "e3m0")),
        ({"exponent_bits": 1, "mantissa_bits": 3, "specials": SpecialValues.IEEE}, ("IEEE", "e1m3")),
        ({"subnormals": False}, ("M = 0", "got M = 3")),
        ({"bias": -200}, ("float32", "bias -200")),
        ({"bias": 200}, ("float32", "bias 200")),
        ({"exponent_bits": 8, "bias": 127, "specials": SpecialValues.NONE}, ("float32", "another bias")),
        ({"exponent_bits": 1, "mantissa_bits": 0, "bias": 0}, ("finite",)),
        ({"exponent_bits": 0, "mantissa_bits": 1, "bias": 0}, ("finite",)),
        ({"exponent_bits": 5, "mantissa_bits": 0, "subnormals": False}, ("unsigned",)),
        (
            {"mantissa_bits": 0, "subnormals": False, "signed": False, "specials": SpecialValues.NONE},
            ("NaN",),
        ),
    ],
)
def test_float_records_that_cannot_be(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        FloatElement(**{**_VALID_FLOAT, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"bits": 1}, ("2 to 8 bits", "got 1")),
        ({"bits": 9}, ("2 to 8 bits", "got 9")),
        ({"fraction_bits": 65}, ("fraction bits", "got 65")),
        ({"fraction_bits": -65}, ("fraction bits", "got -65")),
        ({"signed": False}, ("unsigned", "symmetric")),
    ],
)
def test_int_records_that_cannot_be(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        IntElement(**{"bits": 8, "fraction_bits": 6, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_records_are_frozen_and_hashable() -> None:
    with pytest.raises(AttributeError):
        E8M0.bias = 3  # type: ignore[misc]
    assert len({int_element(4), int_element(4), uint_element(4), float_element(2, 1)}) == 3
