"""The largest element of MX+ and MX++ taken out of its block, for the layout :mod:`~microscale.kernels.cpu.rows16`.

A kernel decodes all elements of a block alike; what the largest has beyond them is a correction, found through the
index byte of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from microscale.formats import BlockFormat, Extension, FloatElement, VectorBlock
from microscale.formats.codec import has_largest
from microscale.layouts.bits import pack_bits, unpack_bits

INDEX_BITS = 5
"""Bits of a place in the index byte; what is above belongs to the split or to the exponent difference of MX++."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactLargest:
    """How the code of a compact MX+ largest element is split.

    The ``low_bits`` last of its ``magnitude_bits`` fraction bits leave; ``first_code`` is the element code of
    2^e_max, to which the bits that stay are added.
    """

    low_bits: int
    magnitude_bits: int
    first_code: int
    is_int: bool


def compact_largest(fmt: BlockFormat) -> CompactLargest | None:
    """Return how the largest element of an MX+ format is split, or None where it is not.

    The element's top binade must be whole (no NaN in it), and what it lacks of the largest element's fraction,
    with a sign, must fit above the place in the index byte: elements of up to 2 exponent bits, and integers.
    """
    if fmt.extension is not Extension.PLUS or fmt.block not in (VectorBlock(16), VectorBlock(32)):
        return None
    element = fmt.element
    if isinstance(element, FloatElement) and element.exponent_bits:
        kept = element.mantissa_bits
        first = element.max_code >> kept << kept
    else:
        kept = element.max_code.bit_length() - 1
        first = 1 << kept
    low_bits = fmt.magnitude_bits - kept
    if element.max_code != first + 2**kept - 1 or INDEX_BITS + low_bits + 1 > 8:
        return None
    return CompactLargest(
        low_bits=low_bits,
        magnitude_bits=fmt.magnitude_bits,
        first_code=first,
        is_int=not isinstance(element, FloatElement),
    )


def low_values(fmt: BlockFormat) -> list[float]:
    """Return what bits 5-7 of the index byte add to the decoded largest element of a compact MX+, for all 8 codes.

    Formula: (-1)^sign * low * 2^(e_max - magnitude bits); codes that cannot occur give 0.
    """
    split = compact_largest(fmt)
    assert split is not None
    step = 2.0 ** (fmt.element.max_exponent - split.magnitude_bits)
    values = [step * low for low in range(2**split.low_bits)]
    values += [-value for value in values]
    return values + [0.0] * (8 - len(values))


def read_index(parts: Mapping[str, Tensor], fmt: BlockFormat) -> tuple[UInt8[Tensor, "rows grid_cols"], Tensor]:
    """Return the index byte of every block (0 where it has no largest element apart), and whether it has one."""
    assert isinstance(fmt.block, VectorBlock)
    scale = parts["scale"]
    is_extended = has_largest(scale, fmt)
    index = torch.where(is_extended, unpack_bits(parts["index"], fmt.index_bits, scale.shape[1]), 0)
    return index & (fmt.block.size - 1) if fmt.extension is Extension.PLUS else index, is_extended


def split_largest(codes: Tensor, parts: Mapping[str, Tensor], fmt: BlockFormat) -> tuple[Tensor, dict[str, Tensor]]:
    """Take the largest elements out of row_major codes; returns the codes in place and the grids of both bytes."""
    assert isinstance(fmt.block, VectorBlock)
    size = fmt.block.size
    index, is_extended = read_index(parts, fmt)
    blocks = codes.unflatten(1, (index.shape[1], size))
    if fmt.has_zero_code and not bool(is_extended.all()):
        blocks = torch.where(is_extended.unsqueeze(-1), blocks, 0)
    place = (index & (size - 1)).to(torch.int64).unsqueeze(-1)
    raw = blocks.gather(-1, place).squeeze(-1)
    split = compact_largest(fmt)
    if split is None:
        in_place = torch.where(is_extended, 0, raw)
        grids = {"index": index, "largest": torch.where(is_extended, raw, 0)}
    else:
        in_place, low = split_codes(raw, split)
        in_place = torch.where(is_extended, in_place, raw)
        grids = {"index": torch.where(is_extended, index | low << INDEX_BITS, 0)}
    return blocks.scatter(-1, place, in_place.unsqueeze(-1)).flatten(1), grids


def join_largest(codes: Tensor, scale: Tensor, grids: Mapping[str, Tensor], fmt: BlockFormat) -> tuple[Tensor, Tensor]:
    """Put the largest elements back; returns row_major codes, not yet dense, and the dense index."""
    assert isinstance(fmt.block, VectorBlock)
    size = fmt.block.size
    blocks = codes.unflatten(1, (scale.shape[1], size))
    is_extended = has_largest(scale, fmt)
    index = grids["index"]
    place = (index & (size - 1)).to(torch.int64).unsqueeze(-1)
    in_place = blocks.gather(-1, place).squeeze(-1)
    split = compact_largest(fmt)
    if split is None:
        raw = grids["largest"]
    else:
        raw = join_codes(in_place, index >> INDEX_BITS, split)
        index = index & (size - 1)
    raw = torch.where(is_extended, raw, in_place)
    return blocks.scatter(-1, place, raw.unsqueeze(-1)).flatten(1), pack_bits(index, fmt.index_bits)


def split_codes(raw: UInt8[Tensor, "..."], split: CompactLargest) -> tuple[UInt8[Tensor, "..."], UInt8[Tensor, "..."]]:
    """Return the element code in place, and the low bits with the sign above them."""
    top, mask = 1 << split.magnitude_bits, (1 << split.magnitude_bits) - 1
    sign = (raw & top) >> split.magnitude_bits
    magnitude = ((raw & mask) >> split.low_bits) + split.first_code
    in_place = (
        torch.where(sign == 1, -magnitude & (2 * top - 1), magnitude) if split.is_int else magnitude | (raw & top)
    )
    return in_place, (raw & ((1 << split.low_bits) - 1)) | sign << split.low_bits


def join_codes(in_place: Tensor, low: Tensor, split: CompactLargest) -> UInt8[Tensor, "..."]:
    top, mask = 1 << split.magnitude_bits, (1 << split.magnitude_bits) - 1
    sign = in_place & top
    magnitude = torch.where(sign == top, -in_place & (2 * top - 1), in_place) if split.is_int else in_place & mask
    fraction = (magnitude - split.first_code) << split.low_bits | (low & ((1 << split.low_bits) - 1))
    return (fraction & mask) | sign
