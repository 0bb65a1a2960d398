"""Dense-and-sparse: which elements are kept, how they are stored, what stays in the dense part."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from microscale.formats import SparseElement, parse_format
from microscale.formats.codec import decode, encode, encode_scale
from microscale.formats.elements import E4M3, FP16
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.layouts.row_major import sparse_count
from vectors.inputs import FLOAT32_MAX, matrices, same_bits

SPECS = [
    *("mxfp4+sparse5%:fp8", "mxfp4+sparse5%:fp16", "nvfp4+sparse10%:fp8", "mxfp4_plus+sparse25%:fp16"),
    *("int4/32:fp16:asym+sparse3%:fp16", "e4m3/4x8:e8m0+sparse7%:fp8", "pair(mxfp4,mxfp8,25%)+sparse10%:fp16"),
    "mxfp8+sparse100%:fp8",
]


def kept_places(values: torch.Tensor, count: int) -> list[int]:
    """The largest finite magnitudes, of equal ones the first; then non-finite places fill up in reading order."""
    flat = values.flatten().tolist()
    rank = [(-abs(v) if math.isfinite(v) else 1.0, place) for place, v in enumerate(flat)]
    return sorted(place for _, place in sorted(rank)[:count])


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=10, deadline=None)
@given(values=matrices(rows=(1, 5), cols=(1, 70), exponents=(-10, 10)))
def test_table_and_dense_part(spec: str, values: torch.Tensor) -> None:
    fmt = parse_format(spec)
    assert fmt.sparse is not None
    packed = quantize(values, spec)
    rows, cols = values.shape
    places = kept_places(values, sparse_count(fmt.sparse, values.numel()))
    assert packed.parts["sparse_columns"].tolist() == [place % cols for place in places]
    offsets = [sum(place < row * cols for place in places) for row in range(rows + 1)]
    assert packed.parts["sparse_offsets"].tolist() == offsets
    kept = values.flatten()[places]
    if fmt.sparse.element is SparseElement.FP8:
        largest = np.float32(kept.abs().max().item() if places else 0.0)
        scale = largest / np.float32(448) if largest > 0 else np.float32(1)
        assert packed.parts["sparse_scale"].item() == max(scale, np.finfo(np.float32).tiny)
        stored = encode(kept / float(scale), E4M3)
        restored = decode(stored, E4M3) * float(scale)
    else:
        stored = encode_scale(kept, FP16)
        restored = stored.float()
    assert same_bits(packed.parts["sparse_values"], stored)
    dense = values.flatten().clone()
    dense[places] = 0.0
    base = spec.partition("+sparse")[0]
    expected = fake_quantize(dense.reshape(rows, cols), base).flatten()
    expected[places] = restored
    assert same_bits(dequantize(packed).flatten(), expected)


def test_the_first_of_equal_magnitudes_is_kept() -> None:
    values = torch.tensor([[1.0, -2.0, 2.0, 2.0], [2.0, -2.0, 0.0, 1.0]])
    packed = quantize(values, "e2m1/4:e8m0+sparse25%:fp16")
    assert packed.parts["sparse_columns"].tolist() == [1, 2]
    assert packed.parts["sparse_values"].tolist() == [-2.0, 2.0]
    assert packed.parts["sparse_offsets"].tolist() == [0, 2, 2]


def test_many_equal_magnitudes_are_kept_in_reading_order() -> None:
    values = torch.tensor([1.0, -3.0, 2.0, 3.0, -1.0]).repeat(20, 1000)
    packed = quantize(values, "mxfp4+sparse10%:fp16")
    threes = (values.flatten().abs() == 3).nonzero().flatten()[:10000]
    assert packed.parts["sparse_columns"].tolist() == (threes % 5000).tolist()
    assert packed.parts["sparse_offsets"].tolist()[:6] == [0, 2000, 4000, 6000, 8000, 10000]


def test_outliers_no_longer_raise_the_scale_of_their_block() -> None:
    values = torch.full((1, 32), 0.25)
    values[0, 7] = 1000.0
    restored = fake_quantize(values, "mxfp4+sparse3%:fp16")
    assert restored[0, 7].item() == 1000.0 and bool((restored[0, :7] == 0.25).all())
    assert bool((fake_quantize(values, "mxfp4")[0, :7] == 0).all())


@pytest.mark.parametrize("element", ["fp8", "fp16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_never_kept_and_poison_their_block_with_its_kept_values(element: str, bad: float) -> None:
    values = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    values[0, 3], values[0, 5], values[1, 40] = bad, 100.0, 50.0
    restored = fake_quantize(values, f"mxfp4+sparse2%:{element}")
    assert restored[0, :32].isnan().all(), "the kept 100 lies in the poisoned block"
    assert not restored[0, 32:].isnan().any() and not restored[1].isnan().any()
    assert restored[1, 40].item() == pytest.approx(50.0, rel=2**-4)


def test_a_tensor_of_nan_or_of_zeros() -> None:
    for element in ("fp8", "fp16"):
        packed = quantize(torch.full((2, 32), math.nan), f"mxfp4+sparse10%:{element}")
        assert dequantize(packed).isnan().all()
        assert not packed.parts["sparse_values"].any(), "zeros fill the table"
        zeros = quantize(torch.zeros(2, 32), f"mxfp4+sparse10%:{element}")
        assert same_bits(dequantize(zeros), torch.zeros(2, 32))
        few = torch.full((1, 32), math.nan)
        few[0, 4] = 1.0
        assert dequantize(quantize(few, f"mxfp4+sparse10%:{element}")).isnan().all()


def test_an_empty_table() -> None:
    values = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    packed = quantize(values, "mxfp4_sparse")  # 0.5 % of 32 rounds to none
    assert packed.parts["sparse_values"].shape == (0,)
    assert same_bits(dequantize(packed), fake_quantize(values, "mxfp4"))


@pytest.mark.parametrize("element, largest", [("fp8", FLOAT32_MAX), ("fp16", 65504.0)])
def test_huge_and_tiny_kept_values(element: str, largest: float) -> None:
    values = torch.zeros(1, 32)
    values[0, 3] = FLOAT32_MAX
    restored = fake_quantize(values, f"mxfp4+sparse4%:{element}")
    assert restored[0, 3].item() == pytest.approx(largest, rel=2**-20) and math.isfinite(restored[0, 3].item())
    values[0, 3] = 2.0**-149
    assert bool(fake_quantize(values, f"mxfp4+sparse4%:{element}").isfinite().all())


def test_inf_under_inf_saturate_is_kept_as_the_largest_number() -> None:
    values = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    values[0, 3] = -math.inf
    assert fake_quantize(values, "mxfp4:inf_saturate+sparse4%:fp16")[0, 3].item() == -65504.0


@pytest.mark.parametrize("cols", [32766, 32767, 32768, 32770])
def test_columns_past_int16(cols: int) -> None:
    values = torch.zeros(1, cols)
    values[0, -1] = 3.0
    packed = quantize(values, f"mxfp4+sparse{100 / cols}%:fp16")
    assert packed.parts["sparse_columns"].dtype == (torch.int16 if cols <= 32767 else torch.int32)
    assert packed.parts["sparse_columns"].tolist() == [cols - 1]
    assert dequantize(packed)[0, -1].item() == 3.0
