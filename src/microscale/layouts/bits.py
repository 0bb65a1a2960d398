"""Dense bit streams: codes of any width packed into bytes, least significant bit first.

The first code takes the lowest bits of the first byte. For 4 bits this is "two per byte, low nibble first", for
6 bits "four in three bytes, little-endian". Every row (last axis) starts on a byte; the bits after the last code
are zero.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from microscale.errors import ShapeError


def row_bytes(count: int, width: int) -> int:
    """Return how many bytes ``count`` codes of ``width`` bits take."""
    return (count * width + 7) // 8


def pack_bits(codes: Integer[Tensor, "... count"], width: int) -> UInt8[Tensor, "... bytes"]:
    """Pack non-negative codes of ``width`` bits (1 to 32); higher bits of a code must be zero."""
    count = codes.shape[-1]
    if width == 8:
        return codes.to(torch.uint8).contiguous()
    if width == 16:
        return codes.to(torch.int16).contiguous().view(torch.uint8)
    per_group = 8 // math.gcd(8, width)
    codes = _pad_last(codes, -count % per_group)
    if width > 8:
        packed = _pack_wide(codes, width)
    else:
        groups = codes.unflatten(-1, (-1, per_group))
        dtype = torch.uint8 if per_group * width == 8 else torch.int64
        word = torch.zeros(groups.shape[:-1], dtype=dtype, device=codes.device)
        for place in range(per_group):
            word |= groups[..., place].to(dtype) << (place * width)
        packed = torch.stack([(word >> (8 * byte)).to(torch.uint8) for byte in range(per_group * width // 8)], dim=-1)
        packed = packed.flatten(-2)
    return packed[..., : row_bytes(count, width)].contiguous()


def unpack_bits(packed: UInt8[Tensor, "... bytes"], width: int, count: int) -> Integer[Tensor, "... count"]:
    """Read ``count`` codes of ``width`` bits from each row: uint8 up to 8 bits, else int32.

    Raises:
        ShapeError: the row length does not belong to ``count`` codes.
    """
    expected = row_bytes(count, width)
    if packed.shape[-1] != expected:
        raise ShapeError(
            f"{count} codes of {width} bits take {expected} bytes a row, got {packed.shape[-1]};"
            " the packed tensor does not belong to this width"
        )
    if width == 8:
        return packed
    if width == 16:
        return packed.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    per_group = 8 // math.gcd(8, width)
    group_bytes = per_group * width // 8
    packed = _pad_last(packed, -expected % group_bytes)
    if width > 8:
        return _unpack_wide(packed, width)[..., :count].contiguous()
    groups = packed.unflatten(-1, (-1, group_bytes))
    dtype = torch.uint8 if group_bytes == 1 else torch.int64
    word = torch.zeros(groups.shape[:-1], dtype=dtype, device=packed.device)
    for byte in range(group_bytes):
        word |= groups[..., byte].to(dtype) << (8 * byte)
    mask = (1 << width) - 1
    codes = torch.stack([((word >> (place * width)) & mask).to(torch.uint8) for place in range(per_group)], dim=-1)
    return codes.flatten(-2)[..., :count].contiguous()


def _pad_last(tensor: Tensor, amount: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, amount)) if amount else tensor


def _pack_wide(codes: Tensor, width: int) -> Tensor:
    bits = (codes.to(torch.int64).unsqueeze(-1) >> torch.arange(width, device=codes.device)) & 1
    octets = bits.flatten(-2).unflatten(-1, (-1, 8))
    return (octets << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def _unpack_wide(packed: Tensor, width: int) -> Tensor:
    bits = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1
    words = bits.flatten(-2)
    words = words[..., : words.shape[-1] // width * width].unflatten(-1, (-1, width))
    return (words << torch.arange(width, device=packed.device)).sum(-1).to(torch.int32)
