"""Activation settings: parsing, printing, refusals with a pointer."""

from __future__ import annotations

import pytest

from microscale.errors import FormatError, FormatSpecError
from microscale.formats import ActivationSpec, RangeKind, parse_activation, parse_format


@pytest.mark.parametrize(
    "spec, kind, argument, text",
    [
        ("mxfp8", RangeKind.DYNAMIC, 0, "mxfp8_e4m3"),
        ("mxfp8@dynamic", RangeKind.DYNAMIC, 0, "mxfp8_e4m3"),
        ("  nvfp4@static ", RangeKind.STATIC, 0, "nvfp4@static"),
        ("e4m3/tensor:fp32@ema(0.99)", RangeKind.EMA, 0.99, "e4m3/tensor:fp32:amax@ema(0.99)"),
        ("nvfp4@ema", RangeKind.EMA, 0.99, "nvfp4@ema(0.99)"),
        ("nvfp4@window(16)", RangeKind.WINDOW, 16, "nvfp4@window(16)"),
        ("nvfp4@window", RangeKind.WINDOW, 16, "nvfp4@window(16)"),
        ("nvfp4@window(1)", RangeKind.WINDOW, 1, "nvfp4@window(1)"),
        ("int8/channel:fp32@static", RangeKind.STATIC, 0, "int8/channel:fp32:amax@static"),
        ("e4m3/tensor:e8m0@static", RangeKind.STATIC, 0, "e4m3/tensor:e8m0:rceil@static"),
        ("nvfp4:threshold(7)@static", RangeKind.STATIC, 0, "nvfp4:threshold(7)@static"),
    ],
)
def test_parse_and_print(spec: str, kind: RangeKind, argument: float, text: str) -> None:
    setting = parse_activation(spec)
    assert (setting.range, setting.argument) == (kind, argument)
    assert str(setting) == text
    assert parse_activation(str(setting)) == setting


def test_records_pass_through() -> None:
    fmt = parse_format("mxfp4")
    assert parse_activation(fmt) == ActivationSpec(format=fmt)
    setting = ActivationSpec(format=parse_format("nvfp4"), range=RangeKind.STATIC)
    assert parse_activation(setting) is setting


@pytest.mark.parametrize(
    "spec, position, problem",
    [
        ("mxfp8@sometimes", 6, "unknown range 'sometimes'"),
        ("  nvfp4@foo", 6, "unknown range 'foo'"),  # leading blanks are dropped before counting
        ("nvfp4@", 6, "unknown range ''"),
        ("nvfp4@ema(x)", 6, "unknown range 'ema(x)'"),
        ("nvfp4@ema(1.2.3)", 6, "1.2.3"),
        ("nvfp4@ema(1)", 6, "between 0 and 1"),
        ("nvfp4@ema(0)", 6, "between 0 and 1"),
        ("nvfp4@window(0)", 6, "whole number"),
        ("nvfp4@window(2.5)", 6, "whole number"),
        ("nvfp4@window(1e999)", 6, "whole number"),
        ("nvfp4@static(3)", 6, "no argument"),
        ("mxfp8@dynamic(3)", 6, "no argument"),
        ("mxfp8@static", 6, "per tensor or channel"),
        ("e4m3/tensor:fp32:std(3)@static", 24, "amax"),
        ("pair(mxfp4,mxfp8,50%)@static", 22, "per tensor or channel"),
        ("int4/tensor:fp16:asym@static", 22, "amax"),
        ("mxfp5@static", 0, "unknown format"),
    ],
)
def test_refusals_point_at_the_word(spec: str, position: int, problem: str) -> None:
    with pytest.raises(FormatSpecError) as caught:
        parse_activation(spec)
    assert problem in str(caught.value)
    assert caught.value.position == position
    lines = str(caught.value).splitlines()
    pointer = next(line for line in lines if line.strip() == "^")
    shown = lines[lines.index(pointer) - 1]
    assert shown[pointer.index("^") :][:4] == (spec.strip() + "    ")[position:][:4].rstrip() or position == len(spec)


@pytest.mark.parametrize(
    "kind, argument",
    [(RangeKind.EMA, 0.0), (RangeKind.EMA, float("nan")), (RangeKind.WINDOW, 0.0), (RangeKind.STATIC, 1.0)],
)
def test_records_that_cannot_be(kind: RangeKind, argument: float) -> None:
    with pytest.raises(FormatError):
        ActivationSpec(format=parse_format("nvfp4"), range=kind, argument=argument)
