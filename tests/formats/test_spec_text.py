"""Records as canonical specs, word by word; that every record comes back from its spec is said in test_grammar.py."""

from __future__ import annotations

from typing import Any

import pytest

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
    ScaleRule,
    Segment,
    SegmentedFormat,
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
    power_of_two_scale,
    uint_element,
)
from microscale.formats.block_shape import Block
from microscale.formats.elements import BF16, E4M3, E8M0, FP16, FP32, FloatElement
from microscale.formats.spec_text import block_text, option_words, scale_text, sparse_text, spec_text

E2M1 = float_element(2, 1)
PLAIN: dict[str, Any] = {"element": E2M1, "block": VectorBlock(32), "scale": E8M0, "rule": ScaleRule.FLOOR}


def block_format(**changes: Any) -> BlockFormat:
    """Return MXFP4 with changes."""
    return BlockFormat(**{**PLAIN, **changes})


@pytest.mark.parametrize(
    ("block", "word"),
    [(VectorBlock(32), "32"), (TileBlock(16, 8), "16x8"), (ChannelBlock(), "channel"), (TensorBlock(), "tensor")],
)
def test_blocks(block: Block, word: str) -> None:
    assert block_text(block) == word


@pytest.mark.parametrize(
    ("scale", "word"),
    [
        (E8M0, "e8m0"),
        (power_of_two_scale(5), "e5m0"),
        (power_of_two_scale(5, bias=7), "e5m0-b7"),
        (E4M3, "e4m3"),
        (float_element(5, 3, signed=False), "ue5m3"),
        (FP16, "fp16"),
        (BF16, "bf16"),
        (FP32, "fp32"),
        # A signed float without mantissa bits needs a word more, for a bare eXm0 is a power of two.
        (float_element(5, 0, specials=SpecialValues.NONE), "e5m0-none"),
        (float_element(5, 0, specials=SpecialValues.NONE, bias=3), "e5m0-none-b3"),
    ],
)
def test_scales(scale: FloatElement, word: str) -> None:
    assert scale_text(scale) == word


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["floor"]),
        ({"rule": ScaleRule.threshold(7.25)}, ["threshold(7.25)"]),
        ({"extension": Extension.PLUSPLUS}, ["floor", "plusplus"]),
        ({"sub_scale": SubScale(size=8, bits=2, kind=SubScaleKind.LINEAR)}, ["floor", "sub(8,2,linear)"]),
        ({"rounding": Rounding.TOWARD_ZERO}, ["floor", "toward_zero"]),
        ({"rounding": Rounding.STOCHASTIC, "seed": 42}, ["floor", "stochastic(42)"]),
        ({"rounding": Rounding.STOCHASTIC}, ["floor", "stochastic(0)"]),
        ({"nan_policy": NaNPolicy.RAISE}, ["floor", "nan_raise"]),
        ({"inf_policy": InfPolicy.SATURATE}, ["floor", "inf_saturate"]),
        ({"element": E4M3, "overflow": Overflow.NONFINITE}, ["floor", "nonfinite"]),
    ],
)
def test_only_what_is_no_default_is_said_but_the_rule_always(changes: dict[str, Any], words: list[str]) -> None:
    assert option_words(block_format(**changes)) == words


@pytest.mark.parametrize(
    ("point", "spec"),
    [(ZeroPoint.INT, "int4/64:fp16:asym"), (ZeroPoint.FP8, "int4/64:fp16:asym(fp8)")],
)
def test_zero_points_stand_in_the_place_of_the_rule(point: ZeroPoint, spec: str) -> None:
    fields = {"element": uint_element(4), "block": VectorBlock(64), "scale": FP16, "rule": ScaleRule.MINMAX}
    assert spec_text(BlockFormat(zero_point=point, **fields)) == spec


def test_the_default_for_nan_is_that_of_the_scale() -> None:
    """A scale without a code for NaN raises by itself; saying so would be one word too many."""
    scale = float_element(4, 3, specials=SpecialValues.NONE)
    silent = block_format(scale=scale, rule=ScaleRule.AMAX, nan_policy=NaNPolicy.RAISE)
    assert spec_text(silent) == "e2m1/32:e4m3-none:amax"


@pytest.mark.parametrize(
    ("percent", "element", "word"),
    [
        (1.0, SparseElement.FP8, "+sparse1%:fp8"),
        (0.5, SparseElement.FP16, "+sparse0.5%:fp16"),
        (100.0, SparseElement.FP8, "+sparse100%:fp8"),
    ],
)
def test_sparse_tables(percent: float, element: SparseElement, word: str) -> None:
    table = SparseTable(percent=percent, element=element)
    assert sparse_text(table) == word and sparse_text(None) == ""
    assert spec_text(block_format(sparse=table)) == f"e2m1/32:e8m0:floor{word}"


def test_whole_specs() -> None:
    nvfp4 = block_format(block=VectorBlock(16), scale=E4M3, tensor_scale=FP32, rule=ScaleRule.AMAX)
    assert spec_text(nvfp4) == "e2m1/16:e4m3+fp32:amax"
    int8 = block_format(element=int_element(8), rule=ScaleRule.RCEIL)
    assert spec_text(int8) == "int8/32:e8m0:rceil"
    pair = PairFormat(low=block_format(), high=int8, high_percent=12.5)
    assert spec_text(pair) == "pair(e2m1/32:e8m0:floor,int8/32:e8m0:rceil,12.5%)"
    parts = (Segment(format=block_format(), cols=64), Segment(format=int8, cols=32))
    assert spec_text(SegmentedFormat(segments=parts)) == "segments(e2m1/32:e8m0:floor*64,int8/32:e8m0:rceil*32)"


@pytest.mark.parametrize("wrong", ["mxfp4", None, 3])
def test_words_are_no_record(wrong: Any) -> None:
    with pytest.raises(FormatError, match=r"a format must be a format record \(parse_format makes one\)"):
        spec_text(wrong)
