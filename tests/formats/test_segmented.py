"""Segments as a format: the record, its words, and its bits."""

from __future__ import annotations

import pytest

from microscale.errors import FormatError, FormatSpecError
from microscale.formats import (
    InfPolicy,
    NaNPolicy,
    Segment,
    SegmentedFormat,
    format_name,
    parse_activation,
    parse_format,
    spec_text,
)

SPEC = "segments(mxfp4*384,mxfp6_e2m3*64,mxfp8_e4m3*64)"


def segmented(spec: str = SPEC) -> SegmentedFormat:
    found = parse_format(spec)
    assert isinstance(found, SegmentedFormat)
    return found


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        "segments(mxfp4*32)",
        "segments(mxfp4:threshold(7.25)*384,int2_asym*32)",
        "segments(mxfp4_plus*31,nvfp4*1,e4m3/channel:fp32*7)",
    ],
)
def test_words_go_there_and_back(spec: str) -> None:
    found = segmented(spec)
    assert format_name(found) == spec.replace(":amax", "") if "channel" not in spec else True
    assert parse_format(format_name(found)) == found == parse_format(spec_text(found))


def test_the_record_says_where_each_segment_stands() -> None:
    places = list(segmented().places())
    assert [(format_name(fmt), at.start, at.stop) for fmt, at in places] == [
        ("mxfp4", 0, 384),
        ("mxfp6_e2m3", 384, 448),
        ("mxfp8_e4m3", 448, 512),
    ]


def test_bits_are_the_mean_by_columns() -> None:
    assert segmented().bits_per_value() == (384 * 4.25 + 64 * 6.25 + 64 * 8.25) / 512
    by_tensor = segmented("segments(e4m3/tensor:fp32*4,mxfp4*12)")
    assert by_tensor.bits_per_value(rows=2) == (4 * (8 + 32 / 8) + 12 * 4.25) / 16


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("segments(mxfp4)", "no format with its number of columns"),
        ("segments(mxfp4*0)", "no format with its number of columns"),
        ("segments(mxfp4*-3)", "no format with its number of columns"),
        ("segments()", "no format with its number of columns"),
        ("segments(mxfp4*4", "not closed"),
        ("segments(pair(mxfp4,mxfp8,50%)*4)", "blocks of one format"),
        ("segments(segments(mxfp4*2)*2)", "blocks of one format"),
        ("segments(mxfp4+sparse0.5%:fp8*4)", "sparse"),
        ("segments(e2m1/16x16:e8m0*4)", "tiles"),
        ("segments(mxfp4*4)+sparse0.5%:fp8", "not closed"),
        ("segments(mxfp5*4)", "unknown format 'mxfp5'"),
        ("segments(mxfp4*4,mxfp8:inf_saturate*4)", "same policy for Inf"),
    ],
)
def test_what_cannot_be_is_refused(spec: str, problem: str) -> None:
    with pytest.raises(FormatSpecError, match=problem):
        parse_format(spec)


def test_no_segments_are_refused() -> None:
    with pytest.raises(FormatError, match="at least one"):
        SegmentedFormat(segments=())
    with pytest.raises(FormatError, match="at least one column"):
        Segment(format=segmented().segments[0].format, cols=0)


def test_policies_are_those_of_the_segments() -> None:
    assert segmented().nan_policy is NaNPolicy.POISON_BLOCK
    assert segmented("segments(mxfp4*4,mxfp8:nan_raise*4)").nan_policy is NaNPolicy.RAISE
    assert segmented("segments(mxfp4:inf_saturate*4)").inf_policy is InfPolicy.SATURATE


def test_activations_are_dynamic_only() -> None:
    assert str(parse_activation(SPEC)) == SPEC
    with pytest.raises(FormatError, match="takes its scales from each block"):
        parse_activation(f"{SPEC}@static")
