"""Dense bit streams: identity for every width and count, the byte order in explicit bytes, wrong lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from microscale.errors import ShapeError
from microscale.layouts import pack_bits, row_bytes, unpack_bits

WIDTHS = range(1, 20)


def reference_pack(codes: list[int], width: int) -> list[int]:
    """One big integer, first code lowest, cut into bytes from its low end."""
    word = sum(code << (place * width) for place, code in enumerate(codes))
    return list(word.to_bytes((len(codes) * width + 7) // 8, "little"))


@pytest.mark.parametrize(
    "width, codes, expected",
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 1, 1], [0x81, 0x01]),
        (2, [1, 2, 3, 0], [0b00_11_10_01]),
        (2, [3], [0x03]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),
        (3, [7, 7, 7], [0xFF, 0x01]),
        (4, [0x1, 0x2, 0x3, 0x4], [0x21, 0x43]),  # low nibble first
        (4, [0xA, 0xB, 0xC], [0xBA, 0x0C]),
        (5, [0x1F, 0x00, 0x1F], [0x1F, 0x7C]),
        (6, [0x01, 0x02, 0x03, 0x04], [0x81, 0x30, 0x10]),  # four in three bytes, little-endian
        (6, [0x3F], [0x3F]),
        (7, [0x7F, 0x00, 0x01], [0x7F, 0x40, 0x00]),
        (8, [0, 127, 255], [0, 127, 255]),
        (11, [0x7FF, 0x001], [0xFF, 0x0F, 0x00]),
        (16, [0x1234, 0xFFFF], [0x34, 0x12, 0xFF, 0xFF]),
        (19, [0x7FFFF, 0x00001], [0xFF, 0xFF, 0x0F, 0x00, 0x00]),
    ],
)
def test_explicit_bytes(width: int, codes: list[int], expected: list[int]) -> None:
    assert reference_pack(codes, width) == expected
    packed = pack_bits(torch.tensor(codes, dtype=torch.int32), width)
    assert packed.dtype == torch.uint8 and packed.tolist() == expected
    assert unpack_bits(packed, width, len(codes)).tolist() == codes


@pytest.mark.parametrize("width", WIDTHS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_unpack_undoes_pack(width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 41))
    codes = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=count, max_size=count))
    packed = pack_bits(torch.tensor(codes, dtype=torch.int32), width)
    assert packed.tolist() == reference_pack(codes, width)
    again = unpack_bits(packed, width, count)
    assert again.tolist() == codes
    assert again.dtype == (torch.uint8 if width <= 8 else torch.int32)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_start_on_bytes_whatever_the_leading_axes(width: int) -> None:
    codes = torch.randint(0, 2**width, (3, 2, 13), generator=torch.Generator().manual_seed(width), dtype=torch.int32)
    packed = pack_bits(codes, width)
    assert packed.shape == (3, 2, row_bytes(13, width)) and packed.is_contiguous()
    for i in range(3):
        for j in range(2):
            assert packed[i, j].tolist() == reference_pack(codes[i, j].tolist(), width)
    assert torch.equal(unpack_bits(packed, width, 13).to(torch.int32), codes)
    small = codes.to(torch.uint8) if width <= 8 else codes
    assert torch.equal(pack_bits(small, width), packed), "the integer dtype of the codes does not matter"
    strided = codes.transpose(0, 1)
    assert torch.equal(pack_bits(strided, width), packed.transpose(0, 1))


@pytest.mark.parametrize("width", WIDTHS)
def test_no_rows_and_no_codes(width: int) -> None:
    for shape in ((0, 12), (3, 0), (0, 0)):
        packed = pack_bits(torch.zeros(shape, dtype=torch.int32), width)
        assert packed.shape == (shape[0], row_bytes(shape[1], width))
        assert unpack_bits(packed, width, shape[1]).shape == shape


@pytest.mark.parametrize("width", WIDTHS)
def test_a_wrong_row_length_is_refused(width: int) -> None:
    right = row_bytes(32, width)
    for wrong in (right - 1, right + 1, 0):
        with pytest.raises(ShapeError) as caught:
            unpack_bits(torch.zeros(2, wrong, dtype=torch.uint8), width, 32)
        assert f"32 codes of {width} bits take {right} bytes a row, got {wrong}" in str(caught.value)


def test_row_bytes() -> None:
    assert [row_bytes(count, width) for count, width in [(0, 4), (1, 1), (8, 1), (9, 1), (3, 4), (4, 6), (32, 19)]] == [
        *(0, 1, 1, 2, 2, 3, 76)
    ]
