"""Slices and joins of quantized tensors: exact in values and bytes, for every format; refusals at every other place."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from format_specs import SPECS
from microscale.errors import DtypeError, FormatError, LayoutError, ShapeError
from microscale.formats import BlockFormat, SegmentedFormat, parse_format
from microscale.kernels import dequantize, quantize, reference, to_layout
from microscale.layouts.slicing import Axis, steps
from microscale.tensor import QuantizedTensor, join_cols, join_rows
from small_models import same_bits

CASES = (
    *SPECS,
    *("e3m2/5:e8m0:sub(1,3,pow2)", "int3/5x7:fp16:asym", "int5/6:fp16:asym", "int2/tensor:fp16:asym", "bf16/9:e8m0"),
    *(
        "int4/channel:fp16:asym(fp8)",
        "e2m1/3x4:e4m3+fp32",
        "e2m1/8:e4m3+fp32:plus",
        "e5m6/3:e8m0",
        "e2m3/6:e8m0:plusplus",
    ),
    *("e4m3/tensor:fp32+sparse3%:fp8", "int8/channel:fp32+sparse100%:fp16", "mxfp4+sparse0.01%:fp8"),
    *("pair(int2/3:fp16:asym,int3/3:fp16:asym,30%)+sparse3%:fp8", "pair(mxfp4_plus,mxfp8_plusplus,50%)"),
    *("pair(int2_asym,int4/32:fp16:asym,0%)", "pair(e2m1/32:e8m0:sub(4,3,pow2),mxfp8,100%)"),
)
SEGMENTED = ("segments(mxfp4*70,nvfp4*32,nvfp4*16,mxfp6_e3m2*32)", "segments(int8/channel:fp32*9,int3/5:fp16:asym*23)")


def assert_same(one: QuantizedTensor, other: QuantizedTensor) -> None:
    assert (one.format, one.shape, one.dtype, one.layout) == (other.format, other.shape, other.dtype, other.layout)
    assert set(one.parts) == set(other.parts)
    assert all(same_bits(part, other.parts[name]) for name, part in one.parts.items())


def assert_values(values: Tensor, expected: Tensor) -> None:
    """The same bits; the sign of NaN depends on the width of the registers."""
    nan = torch.tensor(torch.nan)
    assert same_bits(torch.where(values.isnan(), nan, values), torch.where(expected.isnan(), nan, expected))


def cuts(draw: st.DrawFn, step: int, length: int) -> list[int]:
    inner = draw(st.sets(st.integers(1, max(1, (length - 1) // step)), max_size=4))
    return [0, *sorted(step * place for place in inner if step * place < length), length]


@st.composite
def places(draw: st.DrawFn) -> tuple[str, int, int, list[int], list[int], int]:
    spec = draw(st.sampled_from(CASES))
    rows, cols = draw(st.integers(1, 23)), draw(st.integers(1, 150))
    fmt = parse_format(spec)
    assert not isinstance(fmt, SegmentedFormat)
    row_step, col_step = (step or 1 for step in steps(fmt.block))
    return spec, rows, cols, cuts(draw, row_step, rows), cuts(draw, col_step, cols), draw(st.integers(0, 99))


@settings(max_examples=300, deadline=None)
@given(places())
def test_slices_are_the_values_and_joins_are_the_tensor(case: tuple[str, int, int, list[int], list[int], int]) -> None:
    spec, rows, cols, row_cuts, col_cuts, seed = case
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    fmt = parse_format(spec)
    if isinstance(fmt, BlockFormat) and fmt.scale.nan_code is not None and seed % 3 == 0:
        values[seed % rows, seed % cols] = torch.nan
    tensor = quantize(values, fmt)
    restored, plain = dequantize(tensor), reference.dequantize(tensor)
    by_rows = [tensor.slice_rows(*pair) for pair in pairwise(row_cuts)]
    by_cols = [tensor.slice_cols(*pair) for pair in pairwise(col_cuts)]
    for piece, (begin, end) in zip(by_rows, pairwise(row_cuts), strict=True):
        assert_values(dequantize(piece), restored[begin:end])
        assert_values(reference.dequantize(piece), plain[begin:end])
    for piece, (begin, end) in zip(by_cols, pairwise(col_cuts), strict=True):
        assert_values(dequantize(piece), restored[:, begin:end])
        assert_values(reference.dequantize(piece), plain[:, begin:end])
        twice = [piece.slice_rows(*pair) for pair in pairwise(row_cuts)]
        assert_same(join_rows(twice), piece)
    assert_same(join_rows(by_rows), tensor)
    assert_same(join_cols(by_cols), tensor)


@pytest.mark.parametrize(
    "spec", ["mxfp4", "mxfp6_e2m3", "int8/channel:fp32", "mxfp4_plusplus", "int3_asym", "mxfp4_sparse"]
)
def test_slices_are_laid_out_for_the_kernels(spec: str) -> None:
    """A piece whose memory begins anywhere becomes the rows16 that a copy of it becomes."""
    tensor = quantize(torch.randn(37, 192, generator=torch.Generator().manual_seed(3)), spec)
    for piece in (tensor.slice_rows(5, 26), tensor.slice_cols(64, 192)):
        copied = {name: part.clone() for name, part in piece.parts.items()}
        copy = QuantizedTensor(format=piece.format, shape=piece.shape, dtype=piece.dtype, parts=copied)
        laid = to_layout(piece, "rows16")
        assert_same(laid, to_layout(copy, "rows16"))
        assert same_bits(dequantize(laid), dequantize(piece))


@pytest.mark.parametrize("spec", SEGMENTED)
def test_segments(spec: str) -> None:
    fmt = parse_format(spec)
    assert isinstance(fmt, SegmentedFormat)
    tensor = quantize(torch.randn(11, fmt.cols, generator=torch.Generator().manual_seed(4)), fmt)
    values = dequantize(tensor)
    assert_same(join_rows([tensor.slice_rows(0, 3), tensor.slice_rows(3, 11)]), tensor)
    assert same_bits(dequantize(tensor.slice_rows(3, 11)), values[3:11])
    first, second = parse_spec_steps(fmt)
    pieces = [tensor.slice_cols(0, first), tensor.slice_cols(first, second), tensor.slice_cols(second, fmt.cols)]
    assert same_bits(dequantize(pieces[1]), values[:, first:second])
    assert all(isinstance(piece.format, SegmentedFormat) for piece in pieces)
    assert_same(join_cols(pieces, fmt), tensor)
    with pytest.raises(FormatError, match="join_cols cannot make"):
        join_cols(pieces[1:], fmt)
    with pytest.raises(FormatError, match="columns"):
        join_cols([*pieces, pieces[0]], fmt)


def parse_spec_steps(fmt: SegmentedFormat) -> tuple[int, int]:
    """A cut inside the first segment, and one inside the last."""
    first, last = fmt.segments[0], fmt.segments[-1]
    own = [steps(segment.format.block)[1] or 1 for segment in (first, last)]
    return own[0], fmt.cols - last.cols + (own[1] if own[1] < last.cols else 0)


def test_neighbours_of_one_format_become_one_segment() -> None:
    fmt = parse_format("segments(mxfp4*96,mxfp8*32)")
    tensor = quantize(torch.randn(3, 128, generator=torch.Generator().manual_seed(5)), fmt)
    assert_same(join_cols([tensor.slice_cols(0, 64), tensor.slice_cols(64, 128)]), tensor)
    with pytest.raises(ShapeError, match=r"a block spans 32 cols.*multiples of 32.*got 0 to 70"):
        tensor.slice_cols(0, 70)


@pytest.mark.parametrize("spec", ["mxfp4", "mxfp4_sparse", "adaptive_2_4"])
def test_leading_axes(spec: str) -> None:
    values = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(6))
    tensor = quantize(values, spec)
    restored = dequantize(tensor)
    pieces = [tensor.slice_cols(0, 32), tensor.slice_cols(32, 96)]
    assert pieces[1].shape == (2, 5, 64) and same_bits(dequantize(pieces[1]), restored[..., 32:])
    assert_same(join_cols(pieces), tensor)
    rows = tensor.slice_rows(3, 7)
    assert rows.shape == (4, 96) and same_bits(dequantize(rows), restored.flatten(0, 1)[3:7])


def test_wide_tables_keep_the_type_of_their_columns() -> None:
    tensor = quantize(torch.randn(2, 40000, generator=torch.Generator().manual_seed(7)), "mxfp4+sparse1%:fp16")
    pieces = [tensor.slice_cols(0, 20000), tensor.slice_cols(20000, 40000)]
    assert (
        tensor.parts["sparse_columns"].dtype == torch.int32 and pieces[0].parts["sparse_columns"].dtype == torch.int16
    )
    assert_same(join_cols(pieces), tensor)


@pytest.mark.parametrize(
    "spec, axis, begin, end, expected",
    [
        ("mxfp4", Axis.COLS, 0, 40, "a block spans 32 cols.*multiples of 32"),
        ("mxfp4", Axis.COLS, 16, 64, "got 16 to 64"),
        ("e2m1/4x8:e8m0", Axis.ROWS, 2, 6, "a block spans 4 rows"),
        ("e2m1/4x8:e8m0", Axis.COLS, 0, 4, "a block spans 8 cols"),
        ("adaptive_2_4", Axis.COLS, 8, 64, "a block spans 32 cols"),
        ("mxfp4", Axis.ROWS, 2, 2, "begin < end <= 6.*got 2 to 2"),
        ("mxfp4", Axis.ROWS, -1, 2, "got -1 to 2"),
        ("mxfp4", Axis.COLS, 0, 97, "end <= 96"),
    ],
)
def test_places_that_cannot_be_cut(spec: str, axis: Axis, begin: int, end: int, expected: str) -> None:
    tensor = quantize(torch.randn(6, 96), spec)
    with pytest.raises(ShapeError, match=expected):
        (tensor.slice_rows if axis is Axis.ROWS else tensor.slice_cols)(begin, end)


def test_another_layout_is_refused() -> None:
    laid = to_layout(quantize(torch.randn(16, 64), "mxfp4"), "rows16")
    for call in (lambda: laid.slice_rows(0, 16), lambda: laid.slice_cols(0, 32), lambda: join_rows([laid, laid])):
        with pytest.raises(LayoutError, match=r"row_major, got a tensor laid out as rows16.*first"):
            call()


@pytest.mark.parametrize("spec, part", [("nvfp4", "tensor_inv_scale"), ("int8/tensor:fp32", "scale")])
def test_tensors_of_different_scales_do_not_join(spec: str, part: str) -> None:
    one, other = quantize(torch.randn(4, 64), spec), quantize(torch.randn(4, 64) * 3, spec)
    for join in (join_rows, join_cols):
        with pytest.raises(FormatError, match=f"same {part}.*quantize these together"):
            join([one, other])


def test_what_joins_by_rows_alone() -> None:
    """Rows of a channel format stand alone, side by side they would need one scale for both."""
    one, other = (
        quantize(torch.randn(4, 64), "int8/channel:fp32"),
        quantize(torch.randn(4, 64) * 3, "int8/channel:fp32"),
    )
    assert same_bits(dequantize(join_rows([one, other])), torch.cat([dequantize(one), dequantize(other)]))
    with pytest.raises(FormatError, match="same scale"):
        join_cols([one, other])
    fused = join_rows([quantize(torch.randn(rows, 64), "mxfp4") for rows in (8, 2, 2)])  # q, k, v
    assert fused.shape == (12, 64)


def test_joins_that_do_not_fit() -> None:
    tensor = quantize(torch.randn(6, 40), "mxfp4")
    with pytest.raises(ShapeError, match="at least one"):
        join_rows([])
    with pytest.raises(ShapeError, match=r"fit together.*\[6, 40\].*\[6, 64\]"):
        join_rows([tensor, quantize(torch.randn(6, 64), "mxfp4")])
    with pytest.raises(ShapeError, match=r"a block spans 32 cols.*got \[6, 40\]"):
        join_cols([tensor, tensor])
    with pytest.raises(ShapeError, match="a block spans 4 rows"):
        tiled = quantize(torch.randn(6, 40), "e2m1/4x8:e8m0")
        join_rows([tiled, tiled])
    with pytest.raises(FormatError, match="mxfp4 and mxfp8_e4m3"):
        join_rows([tensor, quantize(torch.randn(6, 40), "mxfp8")])
    with pytest.raises(DtypeError, match=r"float32.*bfloat16"):
        join_rows([tensor, quantize(torch.randn(6, 40).bfloat16(), "mxfp4")])
    with pytest.raises(DtypeError, match=r"list of quantized tensors.*'Tensor'"):
        join_cols([torch.zeros(2, 2)])  # type: ignore[list-item]
