"""The largest element of MX+ taken out of its block: which formats split it, and that no code is lost."""

from __future__ import annotations

import pytest
import torch

from format_specs import block_format
from microscale.formats.codec import decode
from microscale.kernels import dequantize, quantize
from microscale.kernels.cpu.largest import (
    INDEX_BITS,
    compact_largest,
    join_codes,
    join_largest,
    low_values,
    read_index,
    split_codes,
    split_largest,
)
from microscale.layouts import pack_bits, unpack_bits

COMPACT = [
    *("mxfp4_plus", "mxfp6_plus", "mxint8_plus", "mxint4_plus", "nvfp4_plus", "e2m1/16:e8m0:plus"),
    *("e2m3/16:e4m3+fp32:plus", "e1m2/32:e8m0:plus", "e0m3/32:e8m0:plus", "e2m5/32:e8m0:plus", "int2/32:e8m0:plus"),
    *("int3/16:fp16:plus", "int5/32:e8m0:plus", "int6/32:bf16:plus", "int7/16:e8m0:plus", "e2m3-ieee/32:e8m0:plus"),
]
RAW = ["mxfp8_plus", "mxfp4_plusplus", "e3m2/32:fp16:plus", "e2m1-fn/32:e8m0:plus", "e2m1/8:e8m0:plus", "mxfp4"]


@pytest.mark.parametrize("spec", COMPACT)
def test_every_code_survives_the_split(spec: str) -> None:
    """The code in place and the low value add up to (-1)^S 2^e_max (1 + f / 2^B), and join to the code again."""
    fmt = block_format(spec)
    split = compact_largest(fmt)
    assert split is not None
    codes = torch.arange(2**fmt.element.bits).to(torch.uint8)
    in_place, low = split_codes(codes, split)
    assert torch.equal(join_codes(in_place, low, split), codes)
    magnitude = (codes.to(torch.float32) % 2**split.magnitude_bits) * 2.0**-split.magnitude_bits + 1
    expected = magnitude * 2.0**fmt.element.max_exponent
    expected = torch.where(codes >= 2**split.magnitude_bits, -expected, expected)
    assert torch.equal(decode(in_place, fmt.element) + torch.tensor(low_values(fmt))[low.long()], expected)


@pytest.mark.parametrize("spec", RAW)
def test_formats_that_are_not_split(spec: str) -> None:
    """A NaN in the top binade, an exponent difference above the place, too many low bits, other blocks, no MX+."""
    assert compact_largest(block_format(spec)) is None


def test_the_split_of_mxfp4_plus_by_hand() -> None:
    """S f2 f1 f0 is 4 (1 + f / 8): f2 stays as the mantissa bit of 4 or 6, and f1 f0 are steps of one half."""
    split = compact_largest(block_format("mxfp4_plus"))
    assert split is not None
    assert (split.low_bits, split.magnitude_bits, split.first_code, split.is_int) == (2, 3, 0b110, False)
    assert low_values(block_format("mxfp4_plus")) == [0.0, 0.5, 1.0, 1.5, -0.0, -0.5, -1.0, -1.5]
    in_place, low = split_codes(torch.tensor([0b0101, 0b1111], dtype=torch.uint8), split)
    assert in_place.tolist() == [0b0111, 0b1111] and low.tolist() == [0b001, 0b111]  # 6 + 0.5 and -6 - 1.5


@pytest.mark.parametrize("spec", ["mxfp4_plus", "mxint8_plus", "nvfp4_plus", "mxfp8_plus", "mxfp4_plusplus"])
def test_blocks_are_joined_as_they_were(spec: str) -> None:
    """Zero blocks and blocks with scale codes that have no largest element apart included."""
    fmt = block_format(spec)
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(9, 96, generator=generator) * torch.exp2(torch.randint(-9, 9, (9, 1), generator=generator))
    values[0, :40], values[1] = 0.0, 2.0**-149
    packed = quantize(values, fmt)
    codes = unpack_bits(packed.parts["codes"], fmt.element.bits, 96)
    in_place, grids = split_largest(codes, packed.parts, fmt)
    joined, index = join_largest(in_place, packed.parts["scale"], grids, fmt)
    parts = {**packed.parts, "codes": pack_bits(joined.to(torch.uint8), fmt.element.bits), "index": index}
    again = type(packed)(format=fmt, shape=packed.shape, dtype=packed.dtype, parts=parts)
    assert torch.equal(dequantize(again), dequantize(packed))


def test_the_index_of_a_zero_block_is_zero() -> None:
    """Scale code 0 of MXFP4+ says zero: what its index byte holds is not read."""
    packed = quantize(torch.ones(2, 32), "mxfp4_plus")
    parts = dict(packed.parts, index=torch.full_like(packed.parts["index"], 0b00111))
    parts["scale"] = torch.tensor([[0], [127]], dtype=torch.uint8)
    index, is_extended = read_index(parts, block_format("mxfp4_plus"))
    assert index.tolist() == [[0], [7]] and is_extended.tolist() == [[False], [True]]
    assert INDEX_BITS == 5
