"""What linear reads of a format: elements as small integers and as bfloat16 bits, and how a block's rest is added."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from format_specs import block_format
from microscale.kernels.cpu.enums import ElementKind, Extra, ScaleKind, ZeroKind
from microscale.kernels.cpu.products import NO_CODE, products

TWINS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
}


@pytest.mark.parametrize("element", TWINS)
def test_integers_of_both_planes_times_the_step_are_the_values(element: str) -> None:
    """Every plane is unsigned bytes that pair up within 16 bits: at most 126, with the offset taken off again."""
    data = products(block_format(f"{element}/32:e8m0"))
    expected = np.arange(2 ** block_format(f"{element}/32:e8m0").element.bits, dtype=np.uint8).view(TWINS[element])
    weights = (1, 16)[: data.int_planes]
    for code, value in enumerate(expected.astype(np.float64)):
        stored = [data.int_values[plane][code] for plane in range(data.int_planes)]
        assert all(0 <= number <= 126 for number in stored)
        number = sum(
            weight * (each - data.int_offset[plane])
            for plane, (weight, each) in enumerate(zip(weights, stored, strict=True))
        )
        assert number * data.int_step == value


@pytest.mark.parametrize(
    ("spec", "planes", "step"),
    [
        ("mxfp4", 1, 0.5),
        ("mxfp6_e2m3", 1, 0.125),
        ("mxfp6_e3m2", 2, 0.0625),  # 448 steps need a second plane
        ("mxint8", 1, 2.0**-6),
        ("int4/32:fp16", 1, None),
        ("mxfp8", 0, 1.0),
        ("int7/32:e8m0", 0, 1.0),
    ],
)
def test_how_many_planes_of_integers(spec: str, planes: int, step: float | None) -> None:
    data = products(block_format(spec))
    assert data.int_planes == planes
    assert data.int_step == (block_format(spec).element.value(1) if step is None else step)


@pytest.mark.parametrize("element", TWINS)
def test_bfloat16_bits_are_those_of_ml_dtypes(element: str) -> None:
    fmt = block_format(f"{element}/32:e8m0")
    data = products(fmt)
    values = np.arange(2**fmt.element.bits, dtype=np.uint8).view(TWINS[element]).astype(np.float32)
    bits = values.astype(ml_dtypes.bfloat16).view(np.uint16).tolist()
    assert data.bf16_exact == 1
    assert list(data.bf16_values) == (bits * 2 if len(bits) == 16 else bits[:32])


@pytest.mark.parametrize(
    ("spec", "is_exact"),
    [
        ("mxfp8", True),
        ("mxfp8_e5m2", True),
        ("int4/32:fp16", True),
        ("int4_asym", False),
        ("mxint8", False),
        ("e3m0/32:e8m0", True),
        ("e2m1-b100/32:e8m0", False),  # values below 2^-60
        ("int6/32:e8m0", False),
    ],
)
def test_where_values_are_exact_in_bfloat16(spec: str, is_exact: bool) -> None:
    assert bool(products(block_format(spec)).bf16_exact) == is_exact


@pytest.mark.parametrize(
    ("spec", "step", "top"),
    [
        ("mxfp4", 0.5, 12),
        ("mxint8", 2.0**-6, 127),
        ("int4/32:fp16", 0.25, 7),
        ("mxfp8", 0.0, 0),
        ("int8/20:e8m0", 0, 0),
    ],
)
def test_activations_count_in_steps_of_a_signed_byte(spec: str, step: float, top: int) -> None:
    data = products(block_format(spec))
    assert data.act_step == step and max(data.act_integers) == top


def test_the_largest_of_mxfp4_plus_counts_in_halves_too() -> None:
    """4 (1 + f / 8) for f = 0 … 7, and the same below zero."""
    data = products(block_format("mxfp4_plus"))
    assert list(data.act_largest[:16]) == [8, 9, 10, 11, 12, 13, 14, 15, -8, -9, -10, -11, -12, -13, -14, -15]
    assert list(data.low_values) == [0.0, 0.5, 1.0, 1.5, -0.0, -0.5, -1.0, -1.5] and data.low_is_int == 1
    assert math.copysign(1, data.low_values[4]) == -1


@pytest.mark.parametrize(
    ("spec", "element", "extra", "scale"),
    [
        ("mxfp4", ElementKind.TABLE, Extra.NONE, ScaleKind.POWER_OF_TWO),
        ("mxint8", ElementKind.INTEGER, Extra.NONE, ScaleKind.POWER_OF_TWO),
        ("mxfp8", ElementKind.FLOAT8, Extra.NONE, ScaleKind.POWER_OF_TWO),
        ("ue4m4/32:fp16", ElementKind.TABLE, Extra.NONE, ScaleKind.F16),
        ("nvfp4", ElementKind.TABLE, Extra.NONE, ScaleKind.TABLE),
        ("mxfp4:prescale(0.3)", ElementKind.TABLE, Extra.NONE, ScaleKind.TABLE),
        ("mxfp4_plus", ElementKind.TABLE, Extra.LOW, ScaleKind.POWER_OF_TWO),
        ("mxfp8_plus", ElementKind.FLOAT8, Extra.LARGEST, ScaleKind.POWER_OF_TWO),
        ("int4/32:bf16:asym", ElementKind.TABLE, Extra.ZERO_POINT, ScaleKind.BF16),
        ("int8/32:fp32:asym", ElementKind.INTEGER, Extra.ZERO_POINT, ScaleKind.F32),
    ],
)
def test_kinds(spec: str, element: ElementKind, extra: Extra, scale: ScaleKind) -> None:
    data = products(block_format(spec))
    assert (data.element, data.extra, data.scale) == (element, extra, scale)


def test_special_codes_zero_points_and_exponent_differences() -> None:
    assert products(block_format("mxfp8")).special_code == 127
    assert products(block_format("mxfp8_e5m2")).special_code == 124
    assert products(block_format("mxfp4")).special_code == NO_CODE
    assert products(block_format("int4/32:fp16:asym(fp16)")).zero == ZeroKind.F16
    assert products(block_format("int4/32:fp16:asym(fp8)")).zero == ZeroKind.TABLE
    assert list(products(block_format("mxfp4_plusplus")).delta_values) == [2.0**-d for d in range(8)]
    assert list(products(block_format("mxfp4_plus")).delta_values) == [1.0] * 8
