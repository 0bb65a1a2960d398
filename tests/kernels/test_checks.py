"""What every backend refuses before it computes, in the same words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.errors import ArgumentError, DtypeError, FormatError, MicroscaleError, NonFiniteError, ShapeError
from microscale.formats import Draw, parse_format
from microscale.kernels import Backend, Operation, dispatch, fake_quantize, quantize
from microscale.kernels.checks import (
    HADAMARD_SIZES,
    check_amax,
    check_draw,
    check_float_dtype,
    check_values,
    records_gradient,
    uses_amax,
)

VALUES, ONES, MXFP4 = torch.ones(2, 64), torch.ones(64), parse_format("mxfp4")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=r"w1 must be float32, bfloat16 or float16.*cast"):
        quantize(torch.zeros(2, 32, dtype=dtype), "mxfp4", name="w1")
    with pytest.raises(DtypeError):
        fake_quantize(torch.zeros(2, 32, dtype=dtype), "mxfp4_sparse")


@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize(
    "spec", ["mxfp4", "nvfp4", "mxfp4_sparse", "adaptive_2_4", "e4m3/tensor:fp32", "int8/4x4:fp16"]
)
def test_empty_tensors_are_refused(shape: tuple[int, ...], spec: str) -> None:
    for operation in (quantize, fake_quantize):
        with pytest.raises(ShapeError, match=r"w1 has shape .*empty"):
            operation(torch.zeros(shape), spec, name="w1")


def test_scalars_are_refused() -> None:
    with pytest.raises(ShapeError, match="scalar"):
        quantize(torch.tensor(3.0), "mxfp4")


BACKENDS = [backend for backend in dispatch.BACKENDS if not backend.unavailable()]
WRONG: list[tuple[Operation, tuple[Any, ...], type[MicroscaleError], str]] = [
    (Operation.RMS_NORM, (VALUES, torch.ones(32), 0.0), ShapeError, r"weight of rms_norm must be \[64\], got \[32\]"),
    (Operation.RMS_NORM, (VALUES, ONES.long(), 0.0), DtypeError, "weight of rms_norm must be float32.*got torch.int64"),
    (Operation.RMS_NORM, (VALUES.double(), ONES, 0.0), DtypeError, r"input of rms_norm.*float64; cast it first"),
    (Operation.RMS_NORM, (torch.tensor(1.0), torch.ones(1), 0.0), ShapeError, "at least one axis, got a scalar"),
    (Operation.RMS_NORM, (VALUES, ONES, "small"), ArgumentError, "eps of rms_norm must be a number, got 'small'"),
    (Operation.SILU_MUL, (VALUES, ONES), ShapeError, r"one shape, got \[2, 64\] and \[64\]"),
    (Operation.SILU_MUL, (VALUES, VALUES.half()), DtypeError, "one dtype, got torch.float32 and torch.float16"),
    (Operation.SILU_MUL, (VALUES, 1.0), ArgumentError, "up of silu_mul must be a torch tensor, got 1.0"),
    (Operation.HADAMARD, (VALUES, 24), ShapeError, "one of 16, 32, 64, 128, got 24"),
    (Operation.HADAMARD, (VALUES, 128), ShapeError, "last axis that 128 divides, got 64"),
    (Operation.HADAMARD, (VALUES, 16.0), ArgumentError, "size of hadamard must be a whole number, got 16.0"),
    (Operation.HADAMARD, (VALUES, 16, torch.ones(16)), ShapeError, r"signs of hadamard must be \[64\], got \[16\]"),
    (Operation.HADAMARD, (VALUES, 16, ONES.half()), DtypeError, "signs of hadamard must be float32, got torch.float16"),
    (Operation.GATHER_QUANTIZE, (VALUES, ONES, MXFP4), DtypeError, "must be int64, got torch.float32"),
    (Operation.GATHER_QUANTIZE, (VALUES, torch.zeros(2, 2).long(), MXFP4), ShapeError, r"one axis, got \[2, 2\]"),
    (Operation.GATHER_QUANTIZE, (VALUES, torch.tensor([64, 5, -1]), MXFP4), ShapeError, "from 0 to 63, but 2 of 3 are"),
]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize(("operation", "arguments", "error", "words"), WRONG)
def test_wrong_arguments_are_refused_by_name(
    backend: Backend, operation: Operation, arguments: tuple[Any, ...], error: type[MicroscaleError], words: str
) -> None:
    with pytest.raises(error, match=words):
        backend.implementations[operation](*arguments)


def test_sizes_of_the_transform() -> None:
    assert HADAMARD_SIZES == (16, 32, 64, 128)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((5,), (1, 5)), ((3, 4), (3, 4)), ((2, 3, 4), (6, 4)), ((2, 1, 3, 7), (6, 7))]
)
def test_leading_axes_are_rows(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert check_values(torch.ones(shape), "x") == matrix


def test_what_is_no_draw_and_no_float_dtype() -> None:
    check_draw(None)
    check_draw(Draw(seed=1))
    with pytest.raises(
        ArgumentError, match=r"draw must be a microscale.formats.Draw\(seed=, step=, place=\) or None, got 3"
    ):
        check_draw(3)
    check_float_dtype(torch.float64, "the dtype")
    with pytest.raises(DtypeError, match=r"the dtype must be a float dtype, got torch\.int8"):
        check_float_dtype(torch.int8, "the dtype")
    with pytest.raises(ArgumentError, match="the dtype must be a float dtype of torch, got 'float32'"):
        check_float_dtype("float32", "the dtype")


@pytest.mark.parametrize(
    ("spec", "is_used"),
    [
        ("mxfp4", True),
        ("mxfp4:std", False),
        ("mxfp4:percentile(99)", False),
        ("nvfp4:std", True),  # the second level follows from it
        ("int4_asym", False),
        ("int4/32:e4m3+fp32:asym", False),
        ("adaptive_2_4", False),
        ("segments(mxfp4*32,mxfp8*32)", False),
        ("mxfp4_sparse", True),
    ],
)
def test_which_formats_use_a_given_amax(spec: str, is_used: bool) -> None:
    fmt = parse_format(spec)
    assert uses_amax(fmt) == is_used
    if is_used:
        check_amax(torch.tensor(1.0), fmt, 2, 64, "w1")
        return
    with pytest.raises(FormatError, match=r"takes the scales of w1 from all numbers of each block; it cannot use"):
        check_amax(torch.tensor(1.0), fmt, 2, 64, "w1")


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 1), (1, 2), (3, 2)])
def test_an_amax_is_broadcast_to_the_grid(shape: tuple[int, ...]) -> None:
    check_amax(torch.ones(shape), MXFP4, 3, 64, "w1")


@pytest.mark.parametrize("shape", [(5,), (3,), (2, 3), (1, 3, 2), (1, 1, 1)])
def test_an_amax_that_does_not_fit_the_grid_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"amax of w1 must fit its grid of blocks \[3, 2\], got \["):
        check_amax(torch.ones(shape), MXFP4, 3, 64, "w1")


@pytest.mark.parametrize("amax", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4", "e4m3/tensor:fp32"])
def test_an_amax_must_be_finite_and_not_negative(spec: str, amax: float) -> None:
    with pytest.raises(NonFiniteError, match="amax given for w1 must be finite and not negative; calibrate again"):
        fake_quantize(torch.ones(2, 32), spec, amax=torch.tensor(amax), name="w1")


def test_segments_fill_the_width() -> None:
    fmt = parse_format("segments(mxfp4*32,mxfp8*32)")
    check_amax(None, fmt, 2, 64, "w1")
    with pytest.raises(ShapeError, match="is for 64 columns, but w1 has 96"):
        check_amax(None, fmt, 2, 96, "w1")


def test_who_asks_for_a_gradient() -> None:
    plain, asked = torch.ones(2), torch.ones(2, requires_grad=True)
    cases: list[tuple[Tensor, Tensor | None]] = [(plain, None), (plain, plain), (asked, None), (plain, asked)]
    assert [records_gradient(*case) for case in cases] == [False, False, True, True]
    with torch.no_grad():
        assert not any(records_gradient(*case) for case in cases)
