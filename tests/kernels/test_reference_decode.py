"""From codes to numbers: every code against ml_dtypes, and each kind of scale, zero point and extension by hand."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from format_specs import block_format
from microscale.kernels.reference.decode import decode_blocks, decode_largest
from microscale.kernels.reference.encode import EncodedBlocks

TWINS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def decoded(spec: str, codes: list[int], scale: Any, **parts: Any) -> list[float]:
    """The values of one block."""
    stored = scale if isinstance(scale, torch.Tensor) else torch.tensor([[scale]], dtype=torch.uint8)
    encoded = EncodedBlocks(codes=torch.tensor([[codes]], dtype=torch.uint8), scale=stored, **parts)
    return decode_blocks(encoded, block_format(spec)).flatten().tolist()


def grid(*numbers: int) -> torch.Tensor:
    return torch.tensor([[list(numbers)]], dtype=torch.uint8)


def one(number: int) -> torch.Tensor:
    return torch.tensor([[number]], dtype=torch.uint8)


@pytest.mark.parametrize("exponent", [-127, -3, 0, 40, 127])
@pytest.mark.parametrize("element", TWINS)
def test_every_code_times_a_power_of_two_is_that_of_ml_dtypes(element: str, exponent: int) -> None:
    """Exact down to subnormals; past float32 it is Inf; NaN and the sign of zero stay."""
    count = 2 ** block_format(f"{element}/32:e8m0").element.bits
    table = np.arange(count, dtype=np.uint8).view(TWINS[element]).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (table * 2.0**exponent).astype(np.float32)
    got = np.array(decoded(f"{element}/{count}:e8m0", list(range(count)), exponent + 127), dtype=np.float32)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got)[~np.isnan(expected)], np.signbit(expected)[~np.isnan(expected)])


@pytest.mark.parametrize(("spec", "nan"), [("mxfp4", 255), ("e2m1/16:e4m3", 0x7F), ("e2m1/16:e4m3", 0xFF)])
def test_a_scale_that_is_nan_makes_its_whole_block_nan(spec: str, nan: int) -> None:
    assert all(math.isnan(value) for value in decoded(spec, [0, 1, 8, 15], nan))


def test_a_second_level_divides() -> None:
    """NVFP4: 1.5 * (E4M3 0x38 = 1.0) / 4."""
    assert decoded("nvfp4", [3, 15], 0x38, tensor_inv_scale=torch.tensor([4.0])) == [0.375, -1.5]


@pytest.mark.parametrize(
    ("spec", "zero", "expected"),
    [
        ("int4/4:fp16:asym", one(3), [-1.5, 0.0, 2.5, 6.0]),
        ("int4/4:fp16:asym(fp8)", one(0xB8), [0.5, 2.0, 4.5, 8.0]),  # E4M3 0xb8 is -1
        ("int4/4:fp16:asym(fp16)", torch.tensor([[-150.0]], dtype=torch.float16), [75.0, 76.5, 79.0, 82.5]),
    ],
)
def test_zero_points_are_taken_off_before_the_scale(spec: str, zero: torch.Tensor, expected: list[float]) -> None:
    scale = torch.tensor([[0.5]], dtype=torch.float16)
    assert decoded(spec, [0, 3, 8, 15], scale, zero_point=zero) == expected


@pytest.mark.parametrize(("kind", "expected"), [("pow2", [1.0, 2.0, 0.75, 1.5]), ("linear", [0.25, 0.5, 6.0, 12.0])])
def test_sub_scales(kind: str, expected: list[float]) -> None:
    """Codes 0 and 3 stand for 2^0 and 2^-3, or for 1/4 and 4/4; the numbers are 0.5, 1, 3, 6 and the scale is 2."""
    assert decoded(f"e2m1/4:e8m0:sub(2,2,{kind})", [1, 2, 5, 7], 128, sub_scale=grid(0, 3)) == expected


def test_the_largest_element_of_mxfp4_plus() -> None:
    """S f: 4 (1 + f / 8) at the place of the index; the others are plain; scale code 0 is a block of zeros."""
    codes = [0b0101, 0b1101, 0b0001]
    assert decoded("mxfp4_plus", codes, 127, max_idx=one(1)) == [3.0, -6.5, 0.5]
    assert decoded("mxfp4_plus", codes, 127, max_idx=one(0)) == [6.5, -3.0, 0.5]
    assert decoded("mxfp4_plus", codes, 0, max_idx=one(1)) == [0.0, 0.0, 0.0]


def test_the_others_of_mxfp4_plusplus_have_a_smaller_scale() -> None:
    codes = [0b0101, 0b1101, 0b0001]
    found = decoded("mxfp4_plusplus", codes, 128, max_idx=one(1), delta=one(3))
    assert found == [3.0 * 2 / 8, -6.5 * 2, 0.5 * 2 / 8]


def test_nvfp4_plus_is_plain_where_its_scale_is_small() -> None:
    inverse = torch.tensor([1.0])
    small = decoded("nvfp4_plus", [0b0101, 0b0001], 2, max_idx=one(0), tensor_inv_scale=inverse)
    assert small == [3.0 * 2.0**-8, 0.5 * 2.0**-8]  # E4M3 code 2 is 2 * 2^-9
    large = decoded("nvfp4_plus", [0b0101, 0b0001], 0x38, max_idx=one(0), tensor_inv_scale=inverse)
    assert large == [6.5, 0.5]


def test_codes_of_largest_elements_of_integers() -> None:
    """MXINT8+ has seven fraction bits after 1: 1 + f / 128, the sign on top."""
    codes = torch.tensor([0, 1, 127, 128, 255], dtype=torch.uint8)
    found = decode_largest(codes, block_format("mxint8_plus"))
    assert found.tolist() == [1, 1 + 1 / 128, 2 - 1 / 128, -1, -2 + 1 / 128]
