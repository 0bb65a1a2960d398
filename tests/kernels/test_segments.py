"""Tensors of segments: every operation is that of the segments side by side, on every backend and in every layout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bounds import exact_linear, linear_bound
from kernel_levels import LEVELS
from microscale.errors import FormatError, KernelError, NonFiniteError, ShapeError
from microscale.formats import SegmentedFormat, parse_format
from microscale.kernels import dequantize, fake_quantize, gather_quantize, linear, quantize, reference, to_layout
from microscale.kernels.backend import Operation, Request
from microscale.kernels.cpu import BACKEND as CPU
from microscale.kernels.cpu import native
from microscale.kernels.cpu.linear import prepare_segments, segment_activations
from microscale.kernels.dispatch import choose
from microscale.kernels.grid import make_grid
from microscale.kernels.layout import preferred_layout
from microscale.tensor import QuantizedTensor, join_segments
from small_models import same_bits

SPEC = "segments(mxfp4*64,mxfp6_e2m3*32,mxfp8*32)"
OTHERS = [
    "segments(mxfp4_plus*32,nvfp4*32)",
    "segments(int2_asym*32,int4_asym*64,mxfp8*32)",
    "segments(mxfp4*5,int8/channel:fp32*3)",
]
needs_kernels = pytest.mark.skipif(native.NATIVE is None, reason="the compiled kernels are not installed")


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with native.use_level(request.param):
        yield request.param


def segmented(spec: str) -> SegmentedFormat:
    found = parse_format(spec)
    assert isinstance(found, SegmentedFormat)
    return found


def numbers(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    values[..., 3::16] *= 20
    return values


def by_hand(values: Tensor, fmt: SegmentedFormat) -> Tensor:
    """Each segment by the reference kernels of its own format."""
    pieces = values.split([segment.cols for segment in fmt.segments], dim=-1)
    return torch.cat(
        [reference.fake_quantize(piece.contiguous(), s.format) for piece, s in zip(pieces, fmt.segments, strict=True)],
        dim=-1,
    )


@pytest.mark.parametrize("spec", [SPEC, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_that_of_the_segments(spec: str, dtype: torch.dtype) -> None:
    fmt = segmented(spec)
    values = numbers(3, 5, fmt.cols).to(dtype)
    expected = by_hand(values, fmt)
    for module in (reference, None):
        tensor = quantize(values, fmt) if module is None else module.quantize(values, fmt)
        assert tensor.num_bytes == sum(segment.num_bytes for segment in tensor.segments)
        assert same_bits(dequantize(tensor), expected)
        assert same_bits(reference.dequantize(tensor), expected)
        assert same_bits(dequantize(tensor, out=torch.empty_like(values)), expected)
    assert same_bits(fake_quantize(values, fmt), expected)
    assert same_bits(reference.fake_quantize(values, fmt), expected)


@pytest.mark.parametrize("spec", [SPEC, *OTHERS[:2]])
def test_layouts_go_there_and_back(spec: str) -> None:
    fmt = segmented(spec)
    tensor = quantize(numbers(17, fmt.cols), fmt)
    there = to_layout(tensor, "rows16")
    assert there.layout == "rows16"
    plain = reference.to_layout(tensor, "rows16")
    for back in (to_layout(there, "row_major"), reference.to_layout(plain, "row_major")):
        assert set(back.parts) == set(tensor.parts)
        assert all(torch.equal(back.parts[name], part) for name, part in tensor.parts.items())
    assert all(torch.equal(there.parts[name], part) for name, part in plain.parts.items())


def test_rows_of_segments_are_selected() -> None:
    tensor = quantize(numbers(9, 128), SPEC)
    rows = torch.tensor([4, 0, 4])
    chosen = tensor.select_rows(rows)
    assert chosen is not None and same_bits(dequantize(chosen), dequantize(tensor)[rows])
    assert same_bits(dequantize(join_segments(tensor.segments, segmented(SPEC))), dequantize(tensor))


@needs_kernels
@pytest.mark.parametrize("activations", [None, SPEC, "mxfp8", "segments(mxint8*64,mxfp4*32,mxfp6_e3m2*32)"])
@pytest.mark.parametrize("rows", [1, 2, 19])
def test_linear_on_the_cpu_kernels(level: str, activations: str | None, rows: int) -> None:
    """The oracle is the exact product of what the reference kernels make of each segment."""
    fmt = segmented(SPEC)
    weight = to_layout(quantize(numbers(37, 128, seed=1), fmt), "rows16")
    inputs, bias = numbers(rows, 128, seed=2), numbers(37, seed=3)
    record = None if activations is None else parse_format(activations)
    request = Request(
        operation=Operation.LINEAR,
        format=fmt,
        device=inputs.device,
        dtype=inputs.dtype,
        layout="rows16",
        activations=record,
    )
    assert choose(request) is CPU
    used = inputs if record is None else fake_quantize(inputs, record)
    values = by_hand(numbers(37, 128, seed=1), fmt)
    made, remembered = (linear(inputs, weight, bias, activations=activations) for _ in range(2))
    for got in (made, remembered):
        # One rounding for each of three segments more, and the bound has more than 128 of them.
        bound = linear_bound(used, values, fmt, bias) * (1 + 3 / 128)
        assert bool(((got.double() - exact_linear(used, values, bias)).abs() <= bound).all())
    assert torch.allclose(linear(inputs, weight, activations=activations) + bias, remembered, rtol=1e-4, atol=1e-3)


@needs_kernels
@pytest.mark.parametrize("activations", ["segments(mxfp4*32,mxfp6_e2m3*64,mxfp8*32)", "nvfp4", "e2m1/64:fp16"])
def test_segments_that_cross_those_of_the_weight_run_on_the_reference(activations: str) -> None:
    fmt, record = segmented(SPEC), parse_format(activations)
    assert segment_activations(fmt, record) is None
    weight = to_layout(quantize(numbers(37, 128, seed=1), fmt), "rows16")
    inputs = numbers(4, 128)
    expected = fake_quantize(inputs, record) @ dequantize(weight).T
    torch.testing.assert_close(linear(inputs, weight, activations=record), expected)
    with pytest.raises(KernelError, match="must be those of the weight"):
        prepare_segments(weight, record)


def test_a_plain_weight_takes_inputs_of_segments() -> None:
    weight = to_layout(quantize(numbers(37, 128, seed=1), "mxfp4"), "rows16")
    inputs = numbers(4, 128)
    expected = fake_quantize(inputs, SPEC) @ dequantize(weight).T
    torch.testing.assert_close(linear(inputs, weight, activations=SPEC), expected)


@needs_kernels
def test_the_preferred_layout_is_that_of_the_kernels() -> None:
    assert preferred_layout(quantize(numbers(4, 128), SPEC), torch.float32) == "rows16"
    assert preferred_layout(quantize(numbers(4, 8), "segments(mxfp4*5,e2m1/5:fp16*3)"), torch.float32) == "row_major"


@pytest.mark.parametrize("spec", [SPEC, OTHERS[0]])
def test_gather_takes_the_columns_of_each_segment(spec: str) -> None:
    fmt = segmented(spec)
    values = numbers(6, 200)
    columns = torch.randperm(200, generator=torch.Generator().manual_seed(5))[: fmt.cols]
    for quantized in (gather_quantize(values, columns, fmt), reference.gather_quantize(values, columns, fmt)):
        assert quantized.format == fmt
        assert same_bits(dequantize(quantized), by_hand(values[:, columns], fmt))


def test_a_grid_rounds_as_quantize_does() -> None:
    fmt = segmented("segments(mxfp4*64,mxfp4_plus*32,mxfp8*32)")
    weight = numbers(7, 128)
    grid = make_grid(weight, fmt)
    expected = quantize(weight, fmt)
    found = grid.tensor(weight)
    assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())
    values = dequantize(expected)
    for at in (slice(0, 128), slice(60, 100), slice(96, 97)):
        assert torch.equal(grid.round(weight[:, at], at), values[:, at])
    with pytest.raises(ShapeError, match="128 columns"):
        make_grid(weight[:, :64], fmt)


def test_another_width_is_refused() -> None:
    for call in (quantize, fake_quantize, reference.quantize, reference.fake_quantize):
        with pytest.raises(ShapeError, match="is for 128 columns"):
            call(numbers(3, 64), segmented(SPEC))
    with pytest.raises(ShapeError, match="is for tensors of 128 columns"):
        QuantizedTensor(format=segmented(SPEC), shape=(3, 64), dtype=torch.float32, parts={})
    with pytest.raises(FormatError, match="cannot use a given amax"):
        quantize(numbers(3, 128), SPEC, amax=torch.ones(3, 4))


def test_policies_hold_in_each_segment() -> None:
    values = numbers(2, 128)
    values[0, 70] = torch.nan
    restored = fake_quantize(values, SPEC)
    assert bool(torch.isnan(restored[0, 64:96]).all()) and int(torch.isnan(restored).sum()) == 32
    with pytest.raises(NonFiniteError):
        quantize(values, "segments(mxfp4*64,mxfp8:nan_raise*64)")
