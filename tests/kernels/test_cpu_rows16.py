"""rows16: every value at the bit that the layout's formula names, and there and back again bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from format_specs import block_format
from microscale.errors import LayoutError, ShapeError
from microscale.formats import NAMED_FORMATS, BlockFormat, FloatElement, parse_format
from microscale.formats.codec import decode
from microscale.kernels import dequantize, quantize, to_layout
from microscale.kernels.cpu import largest, rows16
from microscale.kernels.reference.scales import scale_factor
from microscale.layouts import LAYOUTS, unpack_bits
from microscale.layouts.row_major import padded_cols
from microscale.tensor import QuantizedTensor
from vectors.inputs import matrices, same_bits

PLANES = {8: [8], 7: [4, 2, 1], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2]}
"""The second copy, on purpose."""

PLAIN = [
    *("e2m1/32:e8m0", "e2m1/16:e4m3+fp32", "e4m3/32:e8m0", "e5m2/64:fp16", "e3m4/128:bf16", "e2m3/32:e8m0"),
    *("e3m2/16:e8m0", "e2m2/32:fp32", "e3m3/channel:fp32", "int8/32:fp32:amax", "int7/16:fp16", "int6/64:e8m0"),
    *("int5/32:bf16", "int4/channel:fp16", "int3/128:fp32", "int2/16:e8m0", "e1m1/32:e8m0", "ue4m4/32:fp16"),
]
ASYMMETRIC = [
    *("int4/64:fp16:asym", "int3/16:fp16:asym", "int2/32:bf16:asym(fp8)", "int5/channel:fp32:asym(fp16)"),
    *("int8/128:e4m3+fp32:asym", "int7/32:fp16:asym(fp16)", "int6/16:fp32:asym(fp8)", "int4/96:fp16:asym(fp16)"),
]
COMPACT = [
    *("mxfp4_plus", "mxfp6_plus", "mxint8_plus", "mxint4_plus", "nvfp4_plus", "e2m1/16:e8m0:plus"),
    *("e2m3/16:e4m3+fp32:plus", "e1m2/32:e8m0:plus", "e0m3/32:e8m0:plus", "e2m5/32:e8m0:plus", "int2/32:e8m0:plus"),
    *("int3/16:fp16:plus", "int5/32:e8m0:plus", "int6/32:bf16:plus", "int7/16:e8m0:plus", "e2m3-ieee/32:e8m0:plus"),
]
RAW = [
    *("mxfp8_plus", "mxfp4_plusplus", "mxfp6_plusplus", "mxfp8_plusplus", "e5m2/32:e8m0:plus", "e3m2/32:fp16:plus"),
    *("int8/32:e8m0:plusplus", "e2m1-fn/32:e8m0:plus", "e4m3/32:e4m3+fp32:plus"),
]
SPARSE = ["mxfp4_sparse", "mxfp6_e2m3+sparse2%:fp16", "nvfp4_plus+sparse1%:fp8"]
LAID_OUT = [*PLAIN, *ASYMMETRIC, *COMPACT, *RAW, *SPARSE]
SHAPES = [(1, 1), (16, 32), (17, 33), (3, 257), (40, 96), (31, 64)]


def made(spec: str, shape: tuple[int, ...], seed: int = 0) -> QuantizedTensor:
    """Numbers of a wide range, a zero block, a block of one number; first elements that are not the largest."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-9, 9, (*shape[:-1], 1), generator=generator)
    )
    values.view(-1)[: shape[-1] // 3] = 0.0
    values.view(-1)[-1] = -100.0
    fmt = block_format(spec)
    if isinstance(fmt.element, FloatElement) and not fmt.element.signed:
        values = values.abs()
    return quantize(values, fmt)


def value_bits(laid: torch.Tensor, bits: int, row: int, col: int) -> int:
    """Read one element's code out of the codes part, by the formula of the layout."""
    tile = laid[row // 16, col // 32].tolist()
    k, lane = col % 32, row % 16
    o, f, b = k >> 3, k & 1, (k & 7) >> 1
    code, done = 0, 0
    for width in PLANES[bits]:
        field, w = (2 * o + f) % (8 // width), (2 * o + f) // (8 // width)
        start = 64 * done + 64 * w + 4 * lane
        dword = int.from_bytes(bytes(tile[start : start + 4]), "little")
        code |= ((dword >> (8 * b + width * field)) & (2**width - 1)) << done
        done += width
    return code


@pytest.mark.parametrize("spec", [*PLAIN, *ASYMMETRIC])
@pytest.mark.parametrize("shape", [(1, 1), (17, 40), (33, 96)])
def test_every_value_stands_where_the_formula_says(spec: str, shape: tuple[int, int]) -> None:
    tensor = made(spec, shape)
    fmt = block_format(spec)
    laid = to_layout(tensor, "rows16").parts["codes"]
    bits = fmt.element.bits
    assert tuple(laid.shape) == (-(-shape[0] // 16), -(-shape[1] // 32), 64 * bits)
    codes = unpack_bits(tensor.parts["codes"], bits, padded_cols(fmt.block, shape[1])).tolist()
    for row in range(laid.shape[0] * 16):
        for col in range(laid.shape[1] * 32):
            is_inside = row < shape[0] and col < shape[1]
            assert value_bits(laid, bits, row, col) == (codes[row][col] if is_inside else 0), (row, col)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_of_a_tile_belongs_to_one_value(bits: int) -> None:
    """Flipping any one bit of a tile changes exactly one value: no bit is shared, none is left over."""
    generator = torch.Generator().manual_seed(bits)
    tile = torch.randint(0, 256, (1, 1, 64 * bits), generator=generator, dtype=torch.uint8)
    before = [value_bits(tile, bits, row, col) for row in range(16) for col in range(32)]
    for place in torch.randint(0, 512 * bits, (40,), generator=generator).tolist():
        flipped = tile.clone()
        flipped[0, 0, place // 8] ^= 1 << (place % 8)
        after = [value_bits(flipped, bits, row, col) for row in range(16) for col in range(32)]
        changed = [one ^ other for one, other in zip(before, after, strict=True) if one != other]
        assert len(changed) == 1 and changed[0].bit_count() == 1


def test_nibbles_keep_their_dwords() -> None:
    tensor = made("mxfp4", (16, 64))
    laid, rows = to_layout(tensor, "rows16").parts["codes"], tensor.parts["codes"]
    for chunk in range(2):
        for o in range(4):
            for lane in range(16):
                start = 64 * o + 4 * lane
                assert torch.equal(laid[0, chunk, start : start + 4], rows[lane, 16 * chunk + 4 * o :][:4])


@pytest.mark.parametrize("spec", LAID_OUT)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back(spec: str, shape: tuple[int, int]) -> None:
    tensor = made(spec, shape, seed=shape[0])
    laid = to_layout(tensor, "rows16")
    assert laid.layout == "rows16" and (laid.format, laid.shape, laid.dtype) == (tensor.format, shape, tensor.dtype)
    assert laid.num_bytes == sum(part.num_bytes for part in rows16.part_specs(tensor.format, shape).values())
    again = to_layout(laid, "row_major")
    for name, part in tensor.parts.items():
        assert same_bits(again.parts[name], part), name
    assert same_bits(dequantize(laid), dequantize(tensor))
    assert to_layout(laid, "rows16") is laid


@pytest.mark.parametrize("spec", LAID_OUT)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_there_and_back_on_hard_numbers(spec: str, data: st.DataObject) -> None:
    values = data.draw(matrices(rows=(1, 35), cols=(1, 200), exponents=(-140, 100)))
    if data.draw(st.booleans()):
        values[0, -1] = math.nan
    tensor = quantize(values, spec)
    again = to_layout(to_layout(tensor, "rows16"), "row_major")
    for name, part in tensor.parts.items():
        assert same_bits(again.parts[name], part), name


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_named_formats(name: str) -> None:
    reason = rows16.refusal(parse_format(name), (20, 70))
    assert (reason is None) == (name != "adaptive_2_4")
    if reason is None:
        tensor = made(name, (20, 70))
        laid = to_layout(tensor, "rows16")
        assert all(same_bits(to_layout(laid, "row_major").parts[key], part) for key, part in tensor.parts.items())


def test_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ("mxfp6_plus", "mxfp8_plusplus", "int3_asym", "mxfp4"):
        tensor = made(spec, (100, 70))
        whole = to_layout(tensor, "rows16")
        monkeypatch.setattr(rows16, "PIECE_ELEMENTS", 2000)
        pieces = to_layout(tensor, "rows16")
        assert all(same_bits(whole.parts[name], part) for name, part in pieces.parts.items())
        again = to_layout(pieces, "row_major")
        assert all(same_bits(again.parts[name], part) for name, part in tensor.parts.items())
        monkeypatch.undo()


def factors(tensor: QuantizedTensor) -> torch.Tensor:
    fmt = tensor.format
    assert isinstance(fmt, BlockFormat)
    return scale_factor(tensor.parts["scale"], fmt, tensor.parts.get("tensor_inv_scale"))


@pytest.mark.parametrize("spec", COMPACT)
def test_compact_largest_is_its_code_plus_the_low_value(spec: str) -> None:
    """What a kernel computes: (decode(code in place) + low value) * factor, and decode(code) * factor elsewhere."""
    fmt, shape = block_format(spec), (19, 96)
    tensor = made(spec, shape, seed=3)
    laid = to_layout(tensor, "rows16")
    assert set(laid.parts) == {"codes", "scale", "index", *(["tensor_inv_scale"] if fmt.tensor_scale else [])} | (
        {"subnormals"} if fmt.element.bits == 8 and isinstance(fmt.element, FloatElement) else set()
    )
    low = largest.low_values(fmt)
    assert len(low) == 8
    size, factor = fmt.block.size, factors(tensor)  # type: ignore[union-attr]
    codes = [[value_bits(laid.parts["codes"], fmt.element.bits, r, c) for c in range(96)] for r in range(19)]
    values = decode(torch.tensor(codes), fmt.element)
    corrections = torch.zeros_like(values)
    num_low = 0
    for row in range(19):
        for block in range(96 // size):
            byte = int(laid.parts["index"][row // 16, block, row % 16])
            corrections[row, block * size + (byte & 31)] = low[byte >> 5]
            num_low += byte >> 5 != 0
    assert num_low > 20, "the test data has low bits"
    expected = dequantize(tensor)
    got = ((values + corrections).unflatten(1, (-1, size)) * factor.unsqueeze(-1)).flatten(1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("spec", RAW)
def test_raw_largest_stands_apart(spec: str) -> None:
    fmt, shape = block_format(spec), (19, 96)
    tensor = made(spec, shape, seed=3)
    laid = to_layout(tensor, "rows16")
    rows = unpack_bits(tensor.parts["codes"], fmt.element.bits, 96)
    for row in range(19):
        for block in range(3):
            byte = int(laid.parts["index"][row // 16, block, row % 16])
            assert byte == int(tensor.parts["index"][row, block])
            code = int(laid.parts["largest"][row // 16, block, row % 16])
            col = 32 * block + (byte & 31)
            in_place = value_bits(laid.parts["codes"], fmt.element.bits, row, col)
            if code:
                assert (code, in_place) == (int(rows[row, col]), 0)
            else:  # a zero or plain block, or a code that is 0
                assert in_place == int(rows[row, col])


@pytest.mark.parametrize("spec", ["e2m1/32:e8m0:plus", "e4m3/32:e8m0:plusplus", "int8/32:e8m0:plus"])
def test_blocks_that_are_zero_by_their_scale_are_cleared(spec: str) -> None:
    """No tensor of ours has codes under scale code 0, but a file may: they are zero, so a kernel must see zeros."""
    tensor = made(spec, (17, 64), seed=5)
    scale = tensor.parts["scale"].clone()
    scale[3, 1] = 0
    damaged = QuantizedTensor(
        format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, parts={**tensor.parts, "scale": scale}
    )
    laid = to_layout(damaged, "rows16")
    assert same_bits(dequantize(laid), dequantize(damaged))
    bits = block_format(spec).element.bits
    assert {value_bits(laid.parts["codes"], bits, 3, col) for col in range(32, 64)} == {0}
    assert {int(part[0, 1, 3]) for name, part in laid.parts.items() if name in ("index", "largest")} == {0}


@pytest.mark.parametrize("spec", ["mxfp8_e4m3", "mxfp8_e5m2", "e3m4/16:fp16", "e2m5/32:e8m0", "ue4m4/channel:fp32"])
def test_subnormal_flags_are_those_of_the_decoded_values(spec: str) -> None:
    fmt = block_format(spec)
    assert isinstance(fmt.element, FloatElement)
    generator = torch.Generator().manual_seed(2)
    numbers = torch.rand(70, 130, generator=generator) / 2 + 0.5
    tiny = fmt.element.min_normal / fmt.element.max_value / 4
    for row, col in ((0, 0), (15, 31), (16, 95), (40, 129), (69, 128)):
        numbers[row, col] = tiny
    numbers[50, 64:96] = 0.0
    tensor = quantize(numbers, fmt)
    laid = to_layout(tensor, "rows16")
    width = padded_cols(fmt.block, 130)
    values = decode(unpack_bits(tensor.parts["codes"], 8, width), fmt.element)[:, :130].abs()
    is_subnormal = (values > 0) & (values < fmt.element.min_normal)
    tensor.parts["codes"][69, 3] = 0xFF if fmt.element.nan_code is not None else 0
    assert int(to_layout(tensor, "rows16").parts["subnormals"][4, 0]) == (2 if fmt.element.nan_code is not None else 0)
    flags = laid.parts["subnormals"]
    assert tuple(flags.shape) == (5, 5) and int(flags.sum()) == 4
    for group in range(5):
        for chunk in range(5):
            tile = is_subnormal[16 * group : 16 * group + 16, 32 * chunk : 32 * chunk + 32]
            assert int(flags[group, chunk]) == int(tile.any())


def test_scales_stand_row_beside_row() -> None:
    tensor = made("e2m1/16:fp16:amax", (20, 40))
    laid = to_layout(tensor, "rows16").parts["scale"]
    assert tuple(laid.shape) == (2, 4, 16) and laid.dtype == torch.float16
    for row in range(32):
        for block in range(4):
            inside = row < 20 and block < 3
            expected = float(tensor.parts["scale"][row, block]) if inside else 0.0
            assert float(laid[row // 16, block, row % 16]) == expected
    channel = to_layout(made("int8/channel:fp32", (20, 40)), "rows16").parts["scale"]
    assert tuple(channel.shape) == (2, 1, 16)


@pytest.mark.parametrize(
    "spec, words",
    [
        ("adaptive_2_4", "pair"),
        ("bf16/32:e8m0", "bf16 has 16"),
        ("e4m3/128x128:fp32", "last axis"),
        ("e4m3/tensor:fp32", "last axis"),
        ("int8/8:fp16", "not 8"),
        ("int8/48:fp16", "not 48"),
        ("mxfp4:sub(8,2,linear)", "sub-groups"),
        ("e2m1/64:e8m0:plus", "plus of e2m1 needs blocks of 32"),
        ("e4m3/16:e8m0:plus", "plus of e4m3 needs blocks of 32"),
        ("e2m1/16:e8m0:plusplus", "plusplus of e2m1 needs blocks of 32"),
    ],
)
def test_refusals_name_the_reason(spec: str, words: str) -> None:
    fmt = parse_format(spec)
    assert words in str(rows16.refusal(fmt, (128, 128)))
    with pytest.raises(LayoutError, match=r"rows16"):
        rows16.part_specs(fmt, (128, 128))
    tensor = quantize(torch.randn(128, 128), fmt)
    with pytest.raises(LayoutError, match=r"cannot be laid out as rows16: .*"):
        to_layout(tensor, "rows16")
    with pytest.raises(LayoutError):
        rows16.pack(tensor.parts, fmt, (128, 128))


def test_unknown_layouts_and_wrong_parts() -> None:
    tensor = made("mxfp4", (16, 32))
    with pytest.raises(LayoutError, match="swizzled"):
        to_layout(tensor, "swizzled")
    with pytest.raises(ShapeError, match="'codes'"):
        QuantizedTensor(
            format=tensor.format, shape=tensor.shape, dtype=tensor.dtype, parts=tensor.parts, layout="rows16"
        )
    with pytest.raises(ShapeError, match="scalar"):
        rows16.refusal(tensor.format, ())
    assert list(LAYOUTS) == ["row_major", "rows16"]


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0)])
def test_empty_tensors(shape: tuple[int, int]) -> None:
    for spec in ("mxfp4", "mxfp8_plusplus", "int3_asym", "nvfp4_plus", "mxfp8"):
        fmt = block_format(spec)
        specs = LAYOUTS["row_major"].part_specs(fmt, shape)
        parts = {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in specs.items()}
        laid = rows16.pack(parts, fmt, shape)
        assert {name: tuple(part.shape) for name, part in laid.items()} == {
            name: part.shape for name, part in rows16.part_specs(fmt, shape).items()
        }
        assert all(same_bits(part, parts[name]) for name, part in rows16.unpack(laid, fmt, shape).items())


def test_leading_axes_are_rows_and_rows_are_not_selected() -> None:
    tensor = made("mxfp6_e3m2", (2, 3, 5, 40))
    laid = to_layout(tensor, "rows16")
    assert same_bits(dequantize(laid), dequantize(tensor)) and laid.rows == 30
    assert laid.select_rows(torch.tensor([1])) is None
