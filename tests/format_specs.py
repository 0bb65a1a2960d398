"""Formats that a test of any format goes over."""

from __future__ import annotations

from microscale.formats import NAMED_FORMATS, BlockFormat, Format, PairFormat, SegmentedFormat, parse_format

SPECS = (
    *NAMED_FORMATS,
    "e2m1/16x16:e8m0",
    "int8/channel:fp32",
    "e4m3/tensor:fp32",
    "e2m1/32:e8m0:sub(8,2,linear)",
    "int4/24:bf16",
    "e2m1/24:e8m0:plus",
    "int3/48:fp16:asym(fp16)",
    "mxfp4+sparse2%:fp16",
    "pair(mxfp4,mxfp8,25%)",
)
"""Beside the named formats: tiles, channels, whole tensors, second levels, wide scales, ragged blocks, compounds."""


def block_format(spec: str) -> BlockFormat:
    """The record of a spec that is neither a pair nor in segments."""
    fmt = parse_format(spec)
    assert isinstance(fmt, BlockFormat), spec
    return fmt


def parts_of(fmt: Format) -> tuple[BlockFormat, ...]:
    """The block formats that a format is made of: itself, or both of a pair."""
    assert not isinstance(fmt, SegmentedFormat), "a format in segments has parts of other widths"
    return (fmt.low, fmt.high) if isinstance(fmt, PairFormat) else (fmt,)
