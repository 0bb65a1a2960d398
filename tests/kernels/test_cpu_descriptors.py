"""The plain data of a format that the kernels read, against ml_dtypes and by hand; where there is none, the reason."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from format_specs import block_format
from microscale.formats import Draw
from microscale.kernels.cpu import enums
from microscale.kernels.cpu.descriptors import (
    NEVER,
    descriptor,
    drawn_descriptor,
    encode_refusal,
    storage_refusal,
)

TWINS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("element", TWINS)
def test_values_of_all_codes_are_those_of_ml_dtypes(element: str) -> None:
    fmt = block_format(f"{element}/32:e8m0")
    count = 2**fmt.element.bits
    expected = np.arange(count, dtype=np.uint8).view(TWINS[element]).astype(np.float32)
    np.testing.assert_array_equal(np.array(descriptor(fmt).element_values[:count], dtype=np.float32), expected)


@pytest.mark.parametrize(("scale", "twin"), [("e8m0", ml_dtypes.float8_e8m0fnu), ("e4m3", ml_dtypes.float8_e4m3fn)])
def test_values_of_all_scale_codes_are_those_of_ml_dtypes(scale: str, twin: type) -> None:
    data = descriptor(block_format(f"e2m1/16:{scale}"))
    expected = np.arange(256, dtype=np.uint8).view(twin).astype(np.float32)
    np.testing.assert_array_equal(np.array(data.scale_values[:], dtype=np.float32), expected)
    assert bool(data.has_exact_inverse) == (scale == "e8m0")
    if scale == "e8m0":
        inverses = np.array(data.scale_inverses[:255], dtype=np.float64)
        np.testing.assert_array_equal(inverses * expected[:255].astype(np.float64), np.ones(255))


def test_e2m1_by_hand() -> None:
    number = descriptor(block_format("mxfp4")).element
    facts = ("bits", "is_signed", "has_subnormals", "mantissa_bits", "bias", "magnitude_bits", "max_code")
    assert [getattr(number, name) for name in facts] == [4, 1, 1, 1, 1, 3, 7]
    assert (number.max_exponent, number.max_value, number.min_normal) == (2, 6.0, 1.0)
    assert number.overflow_code == 7, "it has no NaN: everything past 6 saturates"


@pytest.mark.parametrize(
    ("spec", "overflow"),
    [("mxfp8", 0x7E), ("mxfp8:nonfinite", 0x7F), ("mxfp8_e5m2", 0x7B), ("mxfp8_e5m2:nonfinite", 0x7C)],
)
def test_what_an_overflow_becomes(spec: str, overflow: int) -> None:
    """Saturation at 448 and 57344, or the NaN of E4M3 and the Inf of E5M2."""
    assert descriptor(block_format(spec)).element.overflow_code == overflow


@pytest.mark.parametrize(
    ("rule", "base", "limit"),
    [
        ("floor", -2, NEVER),
        ("ceil", -2, 0),  # any fraction at all goes up
        ("even", -2, 2**23 - 2**21 - 1),  # 1.75 and more rounds to the next power of two
        ("even(0)", -2, 2**23 - 2**22 - 1),  # 1.5 and more
        ("even(23)", -2, NEVER),
        ("rceil", -2, 2**22),  # 6 is 1.5 * 4
        ("threshold(7)", -2, 3 * 2**21),  # 7 is 1.75 * 4
        ("threshold(0.5)", 1, 0),
    ],
)
def test_power_of_two_rules_are_a_shift_and_a_limit_of_the_mantissa(rule: str, base: int, limit: int) -> None:
    data = descriptor(block_format(f"mxfp4:{rule}"))
    assert (data.exponent_base, data.mantissa_limit, data.rule) == (base, limit, enums.Rule.EXPONENT)


@pytest.mark.parametrize(("percent", "rank"), [("100", 32), ("99", 32), ("90", 29), ("50", 16), ("0.1", 1)])
def test_a_percentile_is_the_nearest_rank(percent: str, rank: int) -> None:
    data = descriptor(block_format(f"mxfp4:percentile({percent})"))
    assert (data.statistic, data.percentile_rank) == (enums.Statistic.PERCENTILE, rank)


def test_a_second_level_has_the_numerator_of_its_rule() -> None:
    assert descriptor(block_format("nvfp4")).tensor_numerator == 448 * 6
    assert descriptor(block_format("nvfp4:threshold(7)")).tensor_numerator == 448 * 7
    by_raw = descriptor(block_format("nvfp4:std"))
    assert (by_raw.tensor_by_raw, by_raw.tensor_numerator, by_raw.tensor_numerator_amax) == (1, 448, 448 * 6)


def test_another_draw_leaves_the_shared_record_alone() -> None:
    fmt = block_format("mxfp4:stochastic(3)")
    shared = descriptor(fmt)
    before = shared.noise_key
    assert before == Draw(seed=3).key
    drawn = drawn_descriptor(fmt, Draw(seed=3, step=1))
    assert drawn.noise_key == Draw(seed=3, step=1).key != before
    assert descriptor(fmt) is shared and shared.noise_key == before
    drawn.noise_key = before
    assert bytes(drawn) == bytes(shared), "nothing but the key differs"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mxfp4", None),
        ("bf16/32:e8m0", "takes elements of up to 8 bits, not bf16"),
        ("e4m3/4x8:e8m0", "takes blocks along the last axis (a vector or a channel), not tiles or the whole tensor"),
        ("e4m3/tensor:fp32", "takes blocks along the last axis (a vector or a channel), not tiles or the whole tensor"),
        ("e2m1/32:e8m0:sub(8,2,linear)", "takes no sub-group scales"),
        ("e2m1/64:e8m0:plusplus", "takes index entries of up to 8 bits, not 9"),
        ("e2m1/2097152:e8m0", "takes blocks of up to 1048576 elements, not 2097152"),
    ],
)
def test_what_the_kernels_cannot_read(spec: str, reason: str | None) -> None:
    assert storage_refusal(block_format(spec)) == encode_refusal(block_format(spec)) == reason


def test_percentiles_of_whole_rows_can_be_read_but_not_written() -> None:
    fmt = block_format("e2m1/channel:fp16:percentile(90)")
    assert storage_refusal(fmt) is None
    assert encode_refusal(fmt) == "leaves rule percentile(90) of whole rows to the reference"
