"""The layout ``rows16``: a weight as the CPU kernels of ``linear`` read it, 16 rows side by side, from start to end.

The matrix [rows, cols] becomes R = ceil(rows / 16) groups of rows and C = ceil(cols / 32) chunks of columns. Rows and
columns of padding hold code 0 and scale 0. The parts:

================ ========================== ==========================================================================
part             shape                      content
================ ========================== ==========================================================================
codes            uint8 [R, C, 64 * bits]    element codes in bit planes, see below
scale            [R, G, 16]                 as in row_major; G blocks side by side (two for each chunk for blocks of 16)
index            uint8 [R, G, 16]           MX+, MX++: place of the largest element in bits 0-4; bits 5-7 see below
largest          uint8 [R, G, 16]           MX++, and MX+ that is not compact: code of the largest element
zero_point       [R, G, 16]                 uint8 (integers, fp8) or float16
subnormals       uint8 [R, C]               8-bit floats: bit 0 where the 16 x 32 tile holds a subnormal, bit 1 where it
                                            holds NaN or Inf (derived)
tensor_inv_scale as in row_major            and so the parts of a sparse table
================ ========================== ==========================================================================

*Bit planes.* An element's bits are split into planes of 4, 2 and 1 bits (8 and 4 stay whole), the lowest bits first,
so that every plane is cut out of a dword with one shift and one mask. A plane of width p takes p dwords for each row
of a chunk, a dword of 16 rows beside each other. Value k of a chunk, with o = k >> 3, b = (k & 7) >> 1, f = k & 1 and
q = 2 o + f, stands in dword q // (8 / p) at bit 8 b + p (q % (8 / p)).

*The largest element.* In a compact MX+ (:func:`~microscale.kernels.cpu.largest.compact_largest`) its code is split into
the ordinary element code of its leading bits, which stands in its place, and its last bits with the sign above them,
which go into bits 5 and up of the index: value = decode(code in place) + LOW[index >> 5], with LOW from
:func:`~microscale.kernels.cpu.largest.low_values`. In all others its raw code is in ``largest``, code 0 stands in its
place, and the index byte is that of row_major (MX++ has its exponent difference in bits 5-7). A block that is zero by
its scale code 0 has code 0 everywhere; one that is plain by it (MX+ over a float scale) keeps its codes; index and
largest are 0 in both.

``pack`` and ``unpack`` undo each other for every tensor that ``quantize`` makes. What ``quantize`` never writes is
brought into its form: codes in the padding, codes and index of a block that is zero by its scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from microscale.errors import LayoutError
from microscale.formats import (
    BlockFormat,
    ChannelBlock,
    FloatElement,
    Format,
    PairFormat,
    SegmentedFormat,
    VectorBlock,
    ZeroPoint,
    format_name,
)
from microscale.formats.codec import decode_zero_point
from microscale.kernels.cpu.largest import compact_largest, join_largest, split_largest
from microscale.layouts import Layout, row_major, segments
from microscale.layouts.bits import pack_bits, unpack_bits
from microscale.layouts.row_major import PartSpec, grid_shape, matrix_shape, padded_cols, scale_dtype
from microscale.layouts.slicing import Parts

NAME = "rows16"
ROWS = 16
"""Rows of a group: the lanes of one 512-bit register of float32."""
CHUNK = 32
"""Columns of a chunk: one MX block."""
PLANES: Mapping[int, tuple[int, ...]] = MappingProxyType(
    {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
)
"""Widths of the bit planes of an element, the plane of its lowest bits first."""
PIECE_ELEMENTS = 1 << 19
"""Groups of rows are worked on in pieces of about this many elements, which bounds the memory used meanwhile."""


def refusal(fmt: Format, shape: tuple[int, ...]) -> str | None:
    """Return why a format has no such layout, or None where it has."""
    matrix_shape(shape)
    if isinstance(fmt, SegmentedFormat):
        return segments.first_refusal(refusal, fmt, shape)
    if isinstance(fmt, PairFormat):
        return "the two streams of a pair have no fixed place for a block"
    if fmt.element.bits not in PLANES:
        return f"elements have 2 to 8 bits in it, {fmt.element.name} has {fmt.element.bits}"
    if not isinstance(fmt.block, VectorBlock | ChannelBlock):
        return "it needs blocks along the last axis, or one for each row"
    if isinstance(fmt.block, VectorBlock) and fmt.block.size != 16 and fmt.block.size % CHUNK:
        return f"blocks have 16 or a multiple of {CHUNK} elements in it, not {fmt.block.size}"
    if fmt.sub_scale is not None:
        return "it has no place for the scales of sub-groups"
    if not fmt.is_extended:
        return None
    if compact_largest(fmt) is None and fmt.block != VectorBlock(32):
        return f"{fmt.extension.value} of {fmt.element.name} needs blocks of 32 in it"
    if fmt.block not in (VectorBlock(16), VectorBlock(32)):
        return f"{fmt.extension.value} needs blocks of 16 or 32 in it"
    return None


def part_specs(fmt: Format, shape: tuple[int, ...]) -> dict[str, PartSpec]:
    """Return every part that a tensor of this format and shape has in this layout.

    Raises:
        LayoutError: the format has no such layout; see :func:`refusal`.
    """
    if isinstance(fmt, SegmentedFormat):
        return segments.name_parts([part_specs(part, own) for part, own in segments.shapes(fmt, shape)])
    fmt = accepted(fmt, shape)
    rows, cols = matrix_shape(shape)
    groups, chunks = -(-rows // ROWS), -(-cols // CHUNK)
    side = (groups, _scale_cols(fmt, cols), ROWS)
    specs = {
        "codes": PartSpec(torch.uint8, (groups, chunks, 4 * ROWS * fmt.element.bits)),
        "scale": PartSpec(scale_dtype(fmt), side),
    }
    if fmt.zero_point is not None:
        specs["zero_point"] = PartSpec(torch.float16 if fmt.zero_point is ZeroPoint.FP16 else torch.uint8, side)
    if fmt.is_extended:
        specs["index"] = PartSpec(torch.uint8, side)
        if compact_largest(fmt) is None:
            specs["largest"] = PartSpec(torch.uint8, side)
    if _has_subnormals(fmt):
        specs["subnormals"] = PartSpec(torch.uint8, (groups, chunks))
    for name, spec in row_major.part_specs(fmt, shape).items():
        if is_shared(name):
            specs[name] = spec
    return specs


def pack(parts: Parts, fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the parts in this layout of a tensor given in row_major; what both share is not copied.

    Raises:
        LayoutError: the format has no such layout.
    """
    if isinstance(fmt, SegmentedFormat):
        return segments.relayout(pack, parts, fmt, shape)
    fmt = accepted(fmt, shape)
    rows, cols = matrix_shape(shape)
    packed = _empty_parts(part_specs(fmt, shape), parts)
    for start, stop in _pieces(rows, cols):
        own = {name: part[start:stop] for name, part in parts.items() if not is_shared(name)}
        for name, value in _pack_rows(own, fmt, cols).items():
            packed[name][start // ROWS : -(-stop // ROWS)] = value
    return packed


def unpack(parts: Parts, fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the parts in row_major of a tensor given in this layout: the inverse of :func:`pack`.

    Raises:
        LayoutError: the format has no such layout.
    """
    if isinstance(fmt, SegmentedFormat):
        return segments.relayout(unpack, parts, fmt, shape)
    fmt = accepted(fmt, shape)
    rows, cols = matrix_shape(shape)
    unpacked = _empty_parts(row_major.part_specs(fmt, shape), parts)
    for start, stop in _pieces(rows, cols):
        groups = slice(start // ROWS, -(-stop // ROWS))
        own = {name: part[groups] for name, part in parts.items() if not is_shared(name)}
        for name, value in _unpack_rows(own, fmt, stop - start, cols).items():
            unpacked[name][start:stop] = value
    return unpacked


def _empty_parts(specs: Mapping[str, PartSpec], parts: Parts) -> dict[str, Tensor]:
    """Return memory for parts, but for those that both layouts share."""
    new = parts["codes"].new_empty
    return {name: parts[name] if is_shared(name) else new(s.shape, dtype=s.dtype) for name, s in specs.items()}


def accepted(fmt: Format, shape: tuple[int, ...]) -> BlockFormat:
    """Return the format as one that this layout holds.

    Raises:
        LayoutError: it does not; see :func:`refusal`.
    """
    reason = refusal(fmt, shape)
    if reason is not None or isinstance(fmt, PairFormat | SegmentedFormat):
        raise LayoutError(f"{format_name(fmt)} cannot be laid out as {NAME}: {reason}; keep it in {row_major.NAME}")
    return fmt


def is_shared(name: str) -> bool:
    """Whether a part is the same in both layouts."""
    return name == "tensor_inv_scale" or name.startswith("sparse_")


def _scale_cols(fmt: BlockFormat, cols: int) -> int:
    if isinstance(fmt.block, ChannelBlock):
        return 1
    assert isinstance(fmt.block, VectorBlock)
    return -(-(-(-cols // CHUNK) * CHUNK) // fmt.block.size)


def _has_subnormals(fmt: BlockFormat) -> bool:
    return isinstance(fmt.element, FloatElement) and fmt.element.bits == 8


def _pieces(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    step = max(1, PIECE_ELEMENTS // (ROWS * max(1, cols))) * ROWS
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _pack_rows(parts: Parts, fmt: BlockFormat, cols: int) -> dict[str, Tensor]:
    """Pack consecutive rows of which the first begins a group."""
    bits = fmt.element.bits
    sides = side_grids(parts, fmt)
    packed: dict[str, Tensor] = {}
    if _keeps_dwords(fmt, cols):
        packed["codes"] = _interleave_dwords(parts["codes"])
    else:
        codes = unpack_bits(parts["codes"], bits, padded_cols(fmt.block, cols))
        if fmt.is_extended:
            codes, own = split_largest(codes, parts, fmt)
            sides.update(own)
        codes = _pad(codes[:, :cols], ROWS, CHUNK)
        packed["codes"] = _to_planes(codes, bits)
        if _has_subnormals(fmt):
            packed["subnormals"] = _find_subnormals(packed["codes"], fmt)
    return packed | {name: interleave(grid, fmt, cols) for name, grid in sides.items()}


def side_grids(parts: Parts, fmt: BlockFormat) -> dict[str, Tensor]:
    """Return what stands beside the codes of row_major, one number for each block [rows, grid_cols], index excepted."""
    sides = {"scale": parts["scale"]}
    if fmt.zero_point is not None:
        sides["zero_point"] = parts["zero_point"]
        if fmt.zero_point is not ZeroPoint.FP16:
            sides["zero_point"] = unpack_bits(parts["zero_point"], fmt.zero_point_bits, parts["scale"].shape[1])
    return sides


def _unpack_rows(parts: Parts, fmt: BlockFormat, rows: int, cols: int) -> dict[str, Tensor]:
    bits = fmt.element.bits
    grid_cols = grid_shape(fmt.block, rows, cols)[1]
    unpacked = {"scale": _separate(parts["scale"], rows, grid_cols)}
    if _keeps_dwords(fmt, cols):
        unpacked["codes"] = _separate_dwords(parts["codes"], rows)
    else:
        codes = _from_planes(parts["codes"], bits)[:rows, :cols]
        codes = functional.pad(codes, (0, padded_cols(fmt.block, cols) - cols))
        if fmt.zero_point is not None:
            zero = _separate(parts["zero_point"], rows, grid_cols)
            codes[:, cols:] = _padding_codes(zero[:, -1:], fmt)
        if fmt.is_extended:
            grids = {name: _separate(parts[name], rows, grid_cols) for name in ("index", "largest") if name in parts}
            codes, unpacked["index"] = join_largest(codes, unpacked["scale"], grids, fmt)
        unpacked["codes"] = pack_bits(codes, bits)
    if fmt.zero_point is not None:
        zero = _separate(parts["zero_point"], rows, grid_cols)
        is_wide = fmt.zero_point is ZeroPoint.FP16
        unpacked["zero_point"] = zero if is_wide else pack_bits(zero, fmt.zero_point_bits)
    return unpacked


def _keeps_dwords(fmt: BlockFormat, cols: int) -> bool:
    """Whether dwords of row_major are dwords of this layout: nibbles, nothing split off, no padding."""
    is_whole = cols > 0 and cols % CHUNK == 0 and padded_cols(fmt.block, cols) == cols
    return fmt.element.bits == 4 and not fmt.is_extended and is_whole


def _padding_codes(zero_point: Tensor, fmt: BlockFormat) -> UInt8[Tensor, "rows last"]:
    """Return the code of 0.0 in each row's last block, which is what quantization writes into the padding."""
    return decode_zero_point(zero_point, fmt).clamp(0, 2**fmt.element.bits - 1).to(torch.uint8)


def _pad(matrix: Tensor, row_step: int, col_step: int) -> Tensor:
    rows, cols = matrix.shape
    return functional.pad(matrix, (0, -cols % col_step, 0, -rows % row_step)).contiguous()


def interleave(
    grid: Shaped[Tensor, "rows grid_cols"], fmt: BlockFormat, cols: int
) -> Shaped[Tensor, "groups side_cols 16"]:
    """Return one number for each block as this layout has them: of 16 rows beside each other, padded with zeros."""
    padded = functional.pad(grid, (0, _scale_cols(fmt, cols) - grid.shape[1], 0, -grid.shape[0] % ROWS))
    return padded.unflatten(0, (-1, ROWS)).transpose(1, 2)


def _separate(packed: Shaped[Tensor, "groups side 16"], rows: int, grid_cols: int) -> Shaped[Tensor, "rows grid_cols"]:
    return packed.transpose(1, 2).flatten(0, 1)[:rows, :grid_cols]


def _interleave_dwords(codes: UInt8[Tensor, "rows bytes"]) -> UInt8[Tensor, "groups chunks 256"]:
    """Elements of 4 bits stand in a row's dword as they do in row_major, so that only dwords change places."""
    dwords = _pad(codes, ROWS, 1).view(torch.int32).unflatten(0, (-1, ROWS))
    return dwords.transpose(1, 2).contiguous().view(torch.uint8).unflatten(1, (-1, 4)).flatten(2)


def _separate_dwords(packed: UInt8[Tensor, "groups chunks 256"], rows: int) -> UInt8[Tensor, "rows bytes"]:
    dwords = packed.contiguous().view(torch.int32).unflatten(2, (4, ROWS)).flatten(1, 2)
    return dwords.transpose(1, 2).contiguous().view(torch.uint8).flatten(0, 1)[:rows]


def _to_planes(codes: UInt8[Tensor, "padded_rows padded_cols"], bits: int) -> UInt8[Tensor, "groups chunks bytes"]:
    groups, chunks = codes.shape[0] // ROWS, codes.shape[1] // CHUNK
    if not codes.numel():
        return codes.new_empty(groups, chunks, 4 * ROWS * bits)
    pairs = codes.view(torch.int16)
    lanes = torch.stack([(pairs & 0xFF).to(torch.uint8), (pairs >> 8).to(torch.uint8)], dim=1)
    dwords = lanes.view(torch.int32).reshape(groups, ROWS, 2, chunks, 4)  # [group, row, f, chunk, o], the byte is b
    ordered = dwords.permute(0, 3, 4, 2, 1).contiguous().view(torch.uint8)  # [group, chunk, o, f, row and b]
    if bits == 8:
        return ordered.reshape(groups, chunks, -1)
    planes = torch.empty(groups, chunks, bits, 4 * ROWS, dtype=torch.uint8, device=codes.device)
    done = 0
    for width in PLANES[bits]:
        fields = ordered.reshape(groups, chunks, width, 8 // width, 4 * ROWS)
        own = planes[:, :, done : done + width]
        own.copy_((fields[:, :, :, 0] >> done) & (2**width - 1))
        for field in range(1, 8 // width):
            own |= ((fields[:, :, :, field] >> done) & (2**width - 1)) << (width * field)
        done += width
    return planes.flatten(2)


def _from_planes(packed: UInt8[Tensor, "groups chunks bytes"], bits: int) -> UInt8[Tensor, "padded_rows padded_cols"]:
    groups, chunks = packed.shape[:2]
    if not packed.numel():
        return packed.new_empty(groups * ROWS, chunks * CHUNK)
    planes = packed.reshape(groups, chunks, bits, 4 * ROWS)
    ordered = torch.zeros(groups, chunks, 8, 4 * ROWS, dtype=torch.uint8, device=packed.device)
    done = 0
    for width in PLANES[bits]:
        fields = ordered.view(groups, chunks, width, 8 // width, 4 * ROWS)
        for field in range(8 // width):
            own = (planes[:, :, done : done + width] >> (width * field)) & (2**width - 1)
            fields[:, :, :, field] |= own << done
        done += width
    dwords = ordered.view(torch.int32).reshape(groups, chunks, 4, 2, ROWS)
    lanes = dwords.permute(0, 4, 3, 1, 2).contiguous().view(torch.uint8)  # [group, row, f, chunk, o and b]
    return torch.stack([lanes[:, :, 0], lanes[:, :, 1]], dim=-1).reshape(groups * ROWS, chunks * CHUNK)


def _find_subnormals(codes: UInt8[Tensor, "groups chunks 512"], fmt: BlockFormat) -> UInt8[Tensor, "groups chunks"]:
    assert isinstance(fmt.element, FloatElement)
    magnitude_bits = fmt.element.exponent_bits + fmt.element.mantissa_bits
    magnitudes = codes & (2**magnitude_bits - 1)
    is_subnormal = magnitudes - 1 < 2**fmt.element.mantissa_bits - 1  # 0 becomes 255 and is no subnormal
    flags = _any_of_tile(is_subnormal)
    return flags if fmt.element.nan_code is None else flags | _any_of_tile(magnitudes > fmt.element.max_code) << 1


def _any_of_tile(flags: Bool[Tensor, "groups chunks 512"]) -> UInt8[Tensor, "groups chunks"]:
    return (flags.view(torch.int64).sum(-1) != 0).to(torch.uint8)  # 64 words of eight times 0 or 1


LAYOUT = Layout(
    name=NAME,
    part_specs=part_specs,
    refusal=refusal,
    pack=pack,
    unpack=unpack,
    row_group=ROWS,
    is_shared=is_shared,
)
"""This layout as all others know it."""
