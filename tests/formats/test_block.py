"""Format records: what they refuse and why, and how many bits they store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from format_specs import block_format
from microscale.errors import FormatError
from microscale.formats import (
    BlockFormat,
    ChannelBlock,
    Extension,
    InfPolicy,
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
    float_element,
    int_element,
    parse_format,
    power_of_two_scale,
    uint_element,
)
from microscale.formats.block import sparse_bits_per_value, sparse_column_bits
from microscale.formats.codec import has_largest
from microscale.formats.elements import BF16, E2M1, E4M3, E5M2, E8M0, FP16, FP32

MXFP4: dict[str, Any] = {"element": E2M1, "block": VectorBlock(32), "scale": E8M0, "rule": ScaleRule.FLOOR}
NVFP4: dict[str, Any] = {
    "element": E2M1,
    "block": VectorBlock(16),
    "scale": E4M3,
    "rule": ScaleRule.AMAX,
    "tensor_scale": FP32,
}
ASYM: dict[str, Any] = {
    "element": uint_element(4),
    "block": VectorBlock(64),
    "scale": FP16,
    "rule": ScaleRule.MINMAX,
    "zero_point": ZeroPoint.INT,
}
PLUS = {"extension": Extension.PLUS}
PLUSPLUS = {"extension": Extension.PLUSPLUS}
SUB = SubScale(size=8, bits=2, kind=SubScaleKind.LINEAR)


def test_the_base_records_are_valid() -> None:
    assert BlockFormat(**MXFP4) == parse_format("mxfp4")
    assert BlockFormat(**NVFP4) == parse_format("nvfp4")
    assert BlockFormat(**ASYM) == parse_format("int4/64:fp16:asym")


@pytest.mark.parametrize(
    "base, changes, words",
    [
        # the scale and its rule
        (MXFP4, {"rule": ScaleRule.AMAX}, ("amax", "e8m0", "possible")),
        (MXFP4, {"rule": ScaleRule.MINMAX}, ("minmax", "zero point")),
        (NVFP4, {"rule": ScaleRule.FLOOR}, ("floor", "e4m3", "possible")),
        (NVFP4, {"rule": ScaleRule.EVEN}, ("even", "e4m3")),
        (NVFP4, {"rule": ScaleRule.prescale()}, ("prescale", "e4m3")),
        (MXFP4, {"rule": ScaleRule.mse(-1.5, 1)}, ("mse", "whole")),
        (NVFP4, {"rule": ScaleRule.mse(-1, 1)}, ("mse", "factor")),
        (NVFP4, {"rule": ScaleRule.mse(0, 1)}, ("mse", "factor")),
        (MXFP4, {"scale": float_element(8, 2), "rule": ScaleRule.AMAX}, ("at most 8 bits",)),
        (MXFP4, {"scale": float_element(0, 7), "rule": ScaleRule.AMAX}, ("exponent bits",)),
        (MXFP4, {"tensor_scale": FP32}, ("second scale", "narrow range")),
        (NVFP4, {"scale": BF16}, ("second scale", "narrow range")),
        (NVFP4, {"tensor_scale": FP16}, ("second scale", "fp32")),
        (NVFP4, {"block": TensorBlock()}, ("whole tensor",)),
        (NVFP4, {"scale": float_element(4, 3, specials=SpecialValues.NONE)}, ("NaN", "nan_raise")),
        # the element
        (MXFP4, {"element": E8M0}, ("a scale, not an element",)),
        (MXFP4, {"element": FP32}, ("a scale, not an element",)),
        (MXFP4, {"overflow": Overflow.NONFINITE}, ("neither Inf nor NaN",)),
        (MXFP4, {"element": int_element(8), "overflow": Overflow.NONFINITE}, ("neither Inf nor NaN",)),
        (MXFP4, {"seed": 3}, ("seed", "stochastic")),
        (MXFP4, {"rounding": Rounding.STOCHASTIC, "seed": -3}, ("seed", "-3")),
        # zero points
        (ASYM, {"element": int_element(4)}, ("unsigned",)),
        (ASYM, {"element": E2M1}, ("unsigned",)),
        (ASYM, {"element": uint_element(4, fraction_bits=2)}, ("fraction",)),
        (ASYM, {"scale": E8M0}, ("float scale",)),
        (ASYM, {"rule": ScaleRule.AMAX}, ("minmax",)),
        # plus and plusplus
        (MXFP4, {**PLUS, "rule": ScaleRule.RCEIL}, ("floor", "rceil", "2510.14557")),
        (MXFP4, {**PLUSPLUS, "rule": ScaleRule.EVEN}, ("floor", "even", "2510.14557")),
        (NVFP4, {**PLUS, "rule": ScaleRule.RCEIL}, ("rceil", "amax")),
        (MXFP4, {**PLUS, "block": VectorBlock(1)}, ("2 to 256",)),
        (MXFP4, {**PLUS, "block": VectorBlock(257)}, ("2 to 256",)),
        (MXFP4, {**PLUS, "block": ChannelBlock()}, ("2 to 256",)),
        (MXFP4, {**PLUS, "block": TileBlock(8, 8)}, ("2 to 256",)),
        (MXFP4, {**PLUS, "sub_scale": SUB}, ("sub-group",)),
        (ASYM, PLUS, ("zero point",)),
        (MXFP4, {**PLUS, "element": int_element(4, symmetric=False)}, ("symmetric",)),
        (MXFP4, {**PLUS, "element": uint_element(4)}, ("symmetric",)),
        (MXFP4, {**PLUS, "element": float_element(2, 1, signed=False)}, ("signed",)),
        (NVFP4, PLUSPLUS, ("plusplus", "power-of-two")),
        (MXFP4, {**PLUS, "element": E5M2, "overflow": Overflow.NONFINITE}, ("saturates",)),
        # sub-groups
        (MXFP4, {"sub_scale": SubScale(size=5, bits=2, kind=SubScaleKind.LINEAR)}, ("divide",)),
        (MXFP4, {"sub_scale": SubScale(size=32, bits=2, kind=SubScaleKind.LINEAR)}, ("at least two",)),
        (MXFP4, {"block": ChannelBlock(), "sub_scale": SUB}, ("last axis",)),
        (MXFP4, {"block": TileBlock(8, 8), "sub_scale": SUB}, ("last axis",)),
        (ASYM, {"sub_scale": SUB}, ("zero point",)),
    ],
)
def test_parts_that_contradict_each_other(
    base: dict[str, Any], changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(FormatError) as caught:
        BlockFormat(**{**base, **changes})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: VectorBlock(0), ("at least one", "got 0")),
        (lambda: TileBlock(0, 4), ("at least one", "0x4")),
        (lambda: TileBlock(4, -1), ("at least one", "4x-1")),
        (lambda: SubScale(size=0, bits=2, kind=SubScaleKind.LINEAR), ("at least one",)),
        (lambda: SubScale(size=8, bits=0, kind=SubScaleKind.LINEAR), ("1 to 8 bits", "got 0")),
        (lambda: SubScale(size=8, bits=9, kind=SubScaleKind.LINEAR), ("1 to 8 bits", "got 9")),
        (lambda: SparseTable(percent=0, element=SparseElement.FP8), ("more than 0", "got 0")),
        (lambda: SparseTable(percent=100.5, element=SparseElement.FP8), ("at most 100", "100.5")),
        (lambda: SparseTable(percent=float("nan"), element=SparseElement.FP8), ("nan",)),
    ],
)
def test_small_records_that_cannot_be(make: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


LOW, HIGH = BlockFormat(**MXFP4), BlockFormat(**{**MXFP4, "element": E4M3})


@pytest.mark.parametrize(
    "low, high, percent, words",
    [
        (LOW, BlockFormat(**{**MXFP4, "block": VectorBlock(64)}), 50, ("same block size",)),
        (HIGH, LOW, 50, ("narrower",)),
        (BlockFormat(**{**MXFP4, "block": ChannelBlock()}), HIGH, 50, ("last axis",)),
        (LOW, BlockFormat(**{**NVFP4, "block": VectorBlock(32)}), 50, ("per-tensor scale",)),
        (LOW, parse_format("mxfp8+sparse1%:fp8"), 50, ("sparse",)),
        (LOW, HIGH, -1, ("0 to 100", "got -1")),
        (LOW, HIGH, 101, ("0 to 100", "got 101")),
        (LOW, HIGH, float("nan"), ("0 to 100", "nan")),
    ],
)
def test_pairs_that_cannot_be(low: BlockFormat, high: BlockFormat, percent: float, words: tuple[str, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        PairFormat(low=low, high=high, high_percent=percent)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_policies_of_a_pair() -> None:
    strict = BlockFormat(**MXFP4, nan_policy=NaNPolicy.RAISE)
    assert PairFormat(low=LOW, high=HIGH, high_percent=50).nan_policy is NaNPolicy.POISON_BLOCK
    assert PairFormat(low=strict, high=HIGH, high_percent=50).nan_policy is NaNPolicy.RAISE
    assert PairFormat(low=LOW, high=HIGH, high_percent=50).inf_policy is InfPolicy.AS_NAN
    saturating: dict[str, Any] = {"inf_policy": InfPolicy.SATURATE}
    both = PairFormat(
        low=BlockFormat(**MXFP4, **saturating),
        high=BlockFormat(**{**MXFP4, "element": E4M3}, **saturating),
        high_percent=50,
    )
    assert both.inf_policy is InfPolicy.SATURATE
    with pytest.raises(FormatError, match="Inf"):
        PairFormat(low=BlockFormat(**MXFP4, **saturating), high=HIGH, high_percent=50)


@pytest.mark.parametrize(
    "spec, bits",
    [
        ("e2m1/32:e8m0:plus", 8),  # one byte for blocks of 32, with three reserved bits
        ("e2m1/32:e8m0:plusplus", 8),
        ("e2m1/16:e8m0:plus", 4),
        ("e2m1/16:e8m0:plusplus", 7),
        ("e2m1/2:e8m0:plus", 1),
        ("e2m1/20:e8m0:plus", 5),
        ("e2m1/33:e8m0:plus", 6),
        ("e2m1/64:e8m0:plusplus", 9),
        ("e2m1/128:e8m0:plus", 7),
        ("e2m1/256:e8m0:plus", 8),
        ("e2m1/256:e8m0:plusplus", 11),
        ("mxfp4", 0),
    ],
)
def test_index_bits_are_ceil_log2_of_the_block(spec: str, bits: int) -> None:
    assert block_format(spec).index_bits == bits


@pytest.mark.parametrize(
    "spec, bits",
    [
        ("e2m1/8:e8m0", 5.0),
        ("e2m1/32:e4m3+fp32", 4.25),
        ("e2m1/32:fp16", 4.5),
        ("e2m1/32:fp32", 5.0),
        ("e2m1/32:e5m0", 4.25),  # a scale of 5 bits is stored in a byte
        ("int4/16x16:e8m0", 4 + 8 / 256),
        ("e2m1/32:e8m0:sub(8,2,linear)", 4.5),
        ("e2m1/32:e8m0:sub(4,3,pow2)", 5.0),
        ("int3/64:fp16:asym(fp8)", 3 + 24 / 64),
        ("int3/64:fp16:asym(fp16)", 3.5),
        ("int3/64:fp16:asym", 3 + 19 / 64),
        ("e2m1/64:e8m0:plus", 4 + 14 / 64),
        ("bf16/32:e8m0", 16.25),
        ("mxfp4+sparse1%:fp16", 4.25 + 0.01 * 32),
        ("mxfp4+sparse1%:fp8", 4.25 + 0.01 * 24),
        ("pair(mxfp4,mxfp8,25%)", 0.75 * 4.25 + 0.25 * 8.25 + 1 / 32),
        ("e4m3/channel:fp32", 8.0),
        ("e4m3/tensor:fp32", 8.0),
    ],
)
def test_bits_per_value_without_a_shape(spec: str, bits: float) -> None:
    assert parse_format(spec).bits_per_value() == pytest.approx(bits, rel=1e-15)


@pytest.mark.parametrize(
    "spec, rows, cols, bits",
    [
        ("e4m3/channel:fp32", 8, 256, 8 + 32 / 256),
        ("e4m3/tensor:fp32", 8, 256, 8 + 32 / 2048),
        ("nvfp4", 8, 256, 4.5 + 32 / 2048),
        ("mxfp4+sparse1%:fp16", 10, 100, 4.25 + 0.01 * 32 + 32 * 11 / 1000),
        ("mxfp4+sparse1%:fp8", 10, 100, 4.25 + 0.01 * 24 + (32 * 11 + 32) / 1000),
        ("mxfp4+sparse1%:fp16", 1, 40000, 4.25 + 0.01 * 48 + 64 / 40000),
    ],
)
def test_bits_per_value_with_a_shape(spec: str, rows: int, cols: int, bits: float) -> None:
    assert parse_format(spec).bits_per_value(rows, cols) == pytest.approx(bits, rel=1e-15)


def test_sparse_columns_are_16_bits_wide_up_to_32767() -> None:
    assert [sparse_column_bits(cols) for cols in (None, 1, 32767, 32768, 10**6)] == [16, 16, 16, 32, 32]
    assert sparse_bits_per_value(None, 3, 4) == 0.0


def test_rule_refusal_is_asked_without_building_a_record() -> None:
    fmt = BlockFormat(**MXFP4)
    assert fmt.rule_refusal(ScaleRule.RCEIL) is None
    assert "amax" in (fmt.rule_refusal(ScaleRule(RuleKind.AMAX)) or "")
    assert "minmax" in (BlockFormat(**ASYM).rule_refusal(ScaleRule.FLOOR) or "")


def test_power_of_two_scales_of_other_widths_and_biases_are_formats() -> None:
    for scale in (power_of_two_scale(5), power_of_two_scale(4, bias=3), power_of_two_scale(6)):
        assert BlockFormat(**{**MXFP4, "scale": scale}).scale == scale


@pytest.mark.parametrize(
    ("spec", "place", "delta", "has_zero_code"),
    [
        ("mxfp4_plus", 5, 0, True),
        ("mxfp4_plusplus", 5, 3, True),
        ("e2m1/16:e8m0:plus", 4, 0, True),
        ("e2m1/64:e8m0:plusplus", 6, 3, True),
        ("e2m1/16:e4m3:plus", 4, 0, False),
        ("mxfp4", 0, 0, False),
    ],
)
def test_what_an_index_says(spec: str, place: int, delta: int, has_zero_code: bool) -> None:
    """Place below, exponent difference above; only a power-of-two scale has a code for zero (arXiv 2510.14557)."""
    fmt = block_format(spec)
    assert (fmt.place_bits, fmt.delta_bits, fmt.has_zero_code, fmt.is_extended) == (
        place,
        delta,
        has_zero_code,
        place > 0,
    )


@pytest.mark.parametrize(("spec", "smallest"), [("mxfp4_plus", 1), ("e2m1/16:e4m3:plus", 3)])
def test_blocks_without_a_largest_element(spec: str, smallest: int) -> None:
    """Scale code 0 of E8M0 says zero; over E4M3 codes up to 2 are too small, NaN is not (arXiv 2510.14557 §8.3)."""
    fmt = parse_format(spec)
    assert isinstance(fmt, BlockFormat) and fmt.scale.nan_code is not None
    stored = torch.tensor([0, 1, 2, 3, 100, fmt.scale.nan_code], dtype=torch.uint8)
    assert has_largest(stored, fmt).tolist() == [code >= smallest for code in stored.tolist()]
