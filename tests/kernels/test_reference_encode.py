"""Whole blocks bit for bit against the exact scalar oracle: codes, scale, MX+ index, MX++ difference, values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from format_specs import block_format
from microscale.errors import NonFiniteError
from microscale.formats import BlockFormat, Extension, Rounding, VectorBlock
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.layouts import unpack_bits
from microscale.tensor import QuantizedTensor
from vectors import exact
from vectors.inputs import FLOAT32_MAX, SUBNORMAL, as_floats, matrices, same_bits

PLAIN = [
    f"{element}/{size}:e8m0:{rule}:{rounding}"
    for element, size, rule, rounding in [
        ("e2m1", 32, "floor", "nearest_even"),
        ("e2m1", 32, "rceil", "nearest_away"),
        ("e2m1", 16, "even", "toward_zero"),
        ("e2m1", 32, "threshold(7.25)", "nearest_even"),
        ("e2m3", 32, "floor", "nearest_even"),
        ("e3m2", 32, "ceil", "nearest_away"),
        ("e4m3", 32, "rceil", "nearest_even"),
        ("e4m3", 32, "even(1)", "nearest_even"),
        ("e4m3", 32, "floor:nonfinite", "nearest_even"),
        ("e5m2", 32, "floor:nonfinite", "nearest_away"),
        ("e5m2", 32, "rceil", "toward_zero"),
        ("e3m4", 8, "floor", "nearest_even"),
        ("int8", 32, "rceil", "nearest_even"),
        ("int8-full", 32, "floor", "nearest_away"),
        ("int4", 32, "floor", "nearest_even"),
        ("int2", 7, "ceil", "nearest_even"),
        ("e0m3", 32, "floor", "nearest_even"),
        ("e3m0", 32, "floor", "nearest_even"),
        ("ue2m1", 32, "floor", "nearest_even"),
        ("uint4", 32, "rceil", "nearest_even"),
        ("fp16", 32, "floor", "nearest_even"),
        ("e2m1", 32, "percentile(90)", "nearest_even"),
        ("e2m1", 32, "floor", "stochastic(7)"),
        ("e4m3", 32, "rceil", "stochastic(123456789012)"),
        ("int4", 5, "even", "stochastic(0)"),
    ]
]
EXTENDED = [
    f"{element}/{size}:e8m0:floor:{extension}:{rounding}"
    for element, size, rounding in [
        ("e2m1", 32, "nearest_even"),
        ("e2m1", 32, "nearest_away"),
        ("e2m1", 32, "toward_zero"),
        ("e2m1", 32, "stochastic(3)"),
        ("e2m1", 16, "nearest_even"),
        ("e2m1", 20, "nearest_even"),
        ("e2m1", 2, "nearest_even"),
        ("e2m1", 64, "nearest_even"),
        ("e2m1", 130, "nearest_even"),
        ("e2m1", 256, "nearest_even"),
        ("e2m3", 32, "nearest_even"),
        ("e4m3", 32, "nearest_even"),
        ("e5m2", 32, "nearest_even"),
        ("int8", 32, "nearest_even"),
        ("int4", 32, "nearest_even"),
        ("bf16", 32, "nearest_even"),
        ("e2m1-b5", 32, "nearest_even"),
    ]
    for extension in ("plus", "plusplus")
] + ["e2m1/32:e5m0:plus", "e2m1/32:e4m0:plusplus"]
NARROW_SCALES = ["e2m1/32:e5m0:floor", "e4m3/16:e4m0-b3:rceil", "int8/8:e3m0:even"]


def unpacked(packed: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, padded], index and delta [rows, blocks] of a tensor with blocks along the last axis."""
    fmt = packed.format
    assert isinstance(fmt, BlockFormat) and isinstance(fmt.block, VectorBlock)
    rows, blocks = packed.parts["scale"].shape
    codes = unpack_bits(packed.parts["codes"], fmt.element.bits, blocks * fmt.block.size)
    index = delta = torch.zeros(rows, blocks, dtype=torch.int32)
    if fmt.extension is not Extension.NONE:
        word = unpack_bits(packed.parts["index"], fmt.index_bits, blocks).to(torch.int32)
        place_bits = 5 if fmt.block.size == 32 else math.ceil(math.log2(fmt.block.size))
        index, delta = word & (2**place_bits - 1), word >> place_bits
    return codes, index, delta


def check_against_oracle(values: torch.Tensor, spec: str) -> None:
    fmt = block_format(spec)
    assert isinstance(fmt.block, VectorBlock)
    size = fmt.block.size
    packed = quantize(values, fmt)
    restored = dequantize(packed)
    assert same_bits(restored, fake_quantize(values, fmt))
    codes, index, delta = unpacked(packed)
    rows, cols = values.shape
    width = codes.shape[1]
    for row in range(rows):
        numbers = as_floats(values[row]) + [0.0] * (width - cols)
        for block in range(width // size):
            start = block * size
            noise = [exact.random_bits(row * width + col, fmt.seed) for col in range(start, start + size)]
            expected = exact.quantize_block(
                numbers[start : start + size], fmt, noise if fmt.rounding is Rounding.STOCHASTIC else None
            )
            assert codes[row, start : start + size].tolist() == expected.codes
            assert packed.parts["scale"][row, block].item() == expected.scale
            assert (index[row, block].item(), delta[row, block].item()) == (expected.index, expected.delta)
            stop = min(start + size, cols)
            assert same_bits(restored[row, start:stop], torch.tensor(expected.values[: stop - start]))


@pytest.mark.parametrize("spec", PLAIN + NARROW_SCALES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_plain_blocks(spec: str, data: st.DataObject) -> None:
    check_against_oracle(data.draw(matrices(cols=(1, 70), exponents=(-149, 118))), spec)


@pytest.mark.parametrize("spec", EXTENDED)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_extended_blocks(spec: str, data: st.DataObject) -> None:
    size = block_format(spec).block.size  # type: ignore[union-attr]
    check_against_oracle(data.draw(matrices(cols=(1, max(70, size + 9)), exponents=(-149, 118))), spec)


EDGES = [
    [0.0] * 4,
    [-0.0, 0.0, -0.0, 0.0],
    [SUBNORMAL, -SUBNORMAL, 0.0, -0.0],
    [2.0**-127, 2.0**-128, -(2.0**-129), 2.0**-126],
    [2.0**-125, 2.0**-126, -(2.0**-127), SUBNORMAL],
    [2.0**-124, 2.0**-125, -(2.0**-126), 2.0**-127],
    [1.999 * 2.0**-118, 2.0**-119, 2.0**-120, -(2.0**-121)],
    [FLOAT32_MAX, -FLOAT32_MAX, 1.0, SUBNORMAL],
    [3.4e38, 3e38, 1.7e38, -0.0],
    [2.0**127, -(2.0**126), 2.0**125, 0.0],
    [6.0, 7.0, 7.5, 7.75],
    [-7.75, 7.75, 7.75, 1.0],
    [7.999, -7.999, 3.999, 0.24999],
]


@pytest.mark.parametrize("spec", [*PLAIN, *EXTENDED, *NARROW_SCALES])
def test_edge_blocks(spec: str) -> None:
    check_against_oracle(torch.tensor(EDGES, dtype=torch.float32), spec)


# ---------------------------------------------------------------------------------------------- MX+ and MX++


def block_of(numbers: dict[int, float], size: int = 32) -> torch.Tensor:
    block = torch.zeros(size)
    for place, value in numbers.items():
        block[place] = value
    return block


def test_the_worked_example_of_the_paper() -> None:
    """arXiv 2510.14557: MXFP4 -8.0 (code 1110), MXFP4+ -10.0 (code 1010), MX++ exponents 1 and -2."""
    block = block_of({4: -9.84, 9: 0.99, 20: -0.39})
    plain, plus, plusplus = (quantize(block, name) for name in ("mxfp4", "mxfp4_plus", "mxfp4_plusplus"))
    assert dequantize(plain)[[4, 9, 20]].tolist() == [-8.0, 1.0, -0.0]
    assert unpacked(plain)[0][0, 4].item() == 0b1110
    assert dequantize(plus)[[4, 9, 20]].tolist() == [-10.0, 1.0, -0.0]
    assert unpacked(plus)[0][0, 4].item() == 0b1010
    assert plus.parts["scale"].item() - 127 == 1 and plus.parts["index"].item() == 4
    assert dequantize(plusplus)[[4, 9, 20]].tolist() == [-10.0, 1.0, -0.375]
    assert plusplus.parts["scale"].item() - 127 == 1
    assert plusplus.parts["index"].item() == 3 << 5 | 4  # 1 - 3 = -2


def test_the_first_of_equal_maxima_is_the_largest() -> None:
    block = block_of({7: -5.0, 3: 5.0, 30: 5.0})
    packed = quantize(block, "mxfp4_plus")
    assert packed.parts["index"].item() == 3
    assert dequantize(packed)[[3, 7, 30]].tolist() == [5.0, -4.0, 4.0]


@pytest.mark.parametrize(
    "name, e_max",
    [("mxfp4", 2), ("mxfp6", 2), ("mxfp8", 8), ("mxint8", 0), ("mxint4", 0)],
)
def test_the_zero_rule(name: str, e_max: int) -> None:
    """floor(log2 max) <= -127 + e_max clears the block, scale code 0; one binade more does not."""
    extensions = ("plus", "plusplus") if name in ("mxfp4", "mxfp6", "mxfp8") else ("plus",)
    for extension in extensions:
        spec = f"{name}_{extension}"
        below = quantize(block_of({5: -1.9999 * 2.0 ** (e_max - 127), 6: 2.0**-130}), spec)
        assert not any(part.any() for part in below.parts.values())
        assert same_bits(dequantize(below), torch.zeros(32))
        above = quantize(block_of({5: -(2.0 ** (e_max - 126))}), spec)
        assert above.parts["scale"].item() == 1 and int(above.parts["index"]) & 31 == 5
        assert dequantize(above)[5].item() == -(2.0 ** (e_max - 126))


def test_scale_code_zero_reads_as_zero_whatever_the_codes_say() -> None:
    packed = quantize(block_of({5: 6.0, 6: -3.0}), "mxfp4_plus")
    parts = {**packed.parts, "scale": torch.zeros_like(packed.parts["scale"])}
    cleared = QuantizedTensor(format=packed.format, shape=packed.shape, dtype=packed.dtype, parts=parts)
    assert same_bits(dequantize(cleared), torch.zeros(32))


@pytest.mark.parametrize(
    "name, value, restored",
    [
        ("mxfp4_plus", 7.6, 7.5),
        ("mxfp4_plus", -7.999, -7.5),
        ("mxfp4_plus", 7.25, 7.0),
        ("mxfp4_plus", 4.24, 4.0),
        ("mxfp6_plus", 7.99, 7.875),
        ("mxfp8_plus", 511.9, 510.0),
        ("mxint8_plus", 1.9999, 2 - 2**-7),
        ("mxint4_plus", -1.99, -1.875),
    ],
)
def test_the_largest_element_saturates_at_the_top_of_its_binade(name: str, value: float, restored: float) -> None:
    assert fake_quantize(block_of({11: value}), name)[11].item() == restored


@pytest.mark.parametrize(
    "name, step, low, high",
    [
        ("mxfp4_plus", 0.5, 4, 7.5),
        ("mxfp6_plus", 0.125, 4, 7.875),
        ("mxfp8_plus", 2, 256, 510),
        ("mxint8_plus", 2**-7, 1, 2 - 2**-7),
        ("mxint4_plus", 0.125, 1, 1.875),
    ],
)
def test_every_value_of_the_largest_element(name: str, step: float, low: float, high: float) -> None:
    count = round((high - low) / step) + 1
    rows = torch.zeros(2 * count, 32)
    rows[:, 13] = torch.cat([low + step * torch.arange(count), -low - step * torch.arange(count)])
    packed = quantize(rows, name)
    assert same_bits(dequantize(packed), rows)
    bits = block_format(name).element.bits
    codes = unpacked(packed)[0][:, 13].tolist()
    assert codes == [*range(count), *(code | 1 << (bits - 1) for code in range(count))]
    assert bool((packed.parts["scale"] == 127).all())


def test_mxplusplus_difference_lies_in_bits_5_to_7_and_is_clipped() -> None:
    shared = 0  # largest 4.0 * 2^0
    for exponent in range(-12, 3):
        packed = quantize(block_of({1: 4.0, 31: 2.0**exponent}), "mxfp4_plusplus")
        expected = max(0, min(7, shared - (exponent - 2 + 1)))
        assert packed.parts["index"].item() == expected << 5 | 1
    alone = quantize(block_of({17: -4.0}), "mxfp4_plusplus")
    assert alone.parts["index"].item() == 7 << 5 | 17


@pytest.mark.parametrize("scale_code", range(1, 10))
def test_mxplusplus_scale_of_the_others_never_leaves_e8m0(scale_code: int) -> None:
    largest = 2.0 ** (scale_code - 127 + 2)
    packed = quantize(block_of({2: largest, 3: 2.0**-149}), "mxfp4_plusplus")
    assert packed.parts["scale"].item() == scale_code
    assert int(packed.parts["index"]) >> 5 == min(7, scale_code)


def test_other_block_sizes_take_ceil_log2_index_bits() -> None:
    for size in (2, 3, 16, 20, 33, 64, 100, 128, 129, 200, 255, 256):
        for extension in ("plus", "plusplus"):
            spec = f"e2m1/{size}:e8m0:{extension}"
            values = torch.zeros(1, size * 3)
            places = [size - 1, size + size // 2, 2 * size]
            values[0, places] = torch.tensor([-5.0, 7.0, 4.5])
            packed = quantize(values, spec)
            _, index, delta = unpacked(packed)
            assert index.tolist() == [[size - 1, size // 2, 0]], spec
            assert (delta == (7 if extension == "plusplus" else 0)).all()
            assert dequantize(packed)[0, places].tolist() == [-5.0, 7.0, 4.5]
            bits = math.ceil(math.log2(size)) + (3 if extension == "plusplus" else 0)
            assert packed.parts["index"].shape == (1, 3 if size == 32 else (3 * bits + 7) // 8)


def test_nvfp4_plus_keeps_two_indices_of_four_bits_in_a_byte() -> None:
    values = torch.zeros(2, 48)
    values[0, [5, 16 + 9, 32 + 15]] = torch.tensor([7.0, -7.0, 6.5])
    values[1, [0, 16 + 1, 32 + 2]] = torch.tensor([-6.0, 6.25, 7.0])
    packed = quantize(values, "nvfp4_plus")
    assert packed.parts["index"].tolist() == [[0x95, 0x0F], [0x10, 0x02]]


@settings(max_examples=60, deadline=None)
@given(
    matrices(rows=(1, 3), cols=(16, 48), exponents=(-145, 125)),
    st.sampled_from(["nvfp4_plus", "e4m3/16:e4m3+fp32:plus", "int8/16:ue4m3:plus", "e2m1/16:e5m2:plus"]),
)
def test_plus_over_a_float_scale(values: torch.Tensor, spec: str) -> None:
    values = values[:, : values.shape[1] // 16 * 16]
    fmt = block_format(spec)
    packed = quantize(values, fmt)
    inv_scale = None
    if fmt.tensor_scale is not None:
        top = fmt.scale.max_value * float(exact.max_magnitude(fmt.element))
        inv_scale = exact.f32_inverse_scale(float(values.abs().max()), top)
    codes, index, _ = unpacked(packed)
    restored = dequantize(packed)
    for row in range(values.shape[0]):
        for block in range(values.shape[1] // 16):
            place = slice(16 * block, 16 * block + 16)
            expected = exact.quantize_float_scale_block(as_floats(values[row, place]), fmt, inv_scale)
            assert packed.parts["scale"][row, block].item() == expected.scale
            assert index[row, block].item() == expected.index
            assert codes[row, place].tolist() == expected.codes
            assert same_bits(restored[row, place], torch.tensor(expected.values))


def test_nvfp4_plus_is_plain_for_scale_codes_up_to_2() -> None:
    values = torch.zeros(8, 16)
    values[0, 0] = 2688.0  # g = 1: the scale of a block is amax / 6
    for code in range(1, 8):
        values[code, 3] = 6 * code * 2.0**-9
        values[code, 8] = 5 * code * 2.0**-9
    plus, plain = quantize(values, "nvfp4_plus"), quantize(values, "nvfp4")
    assert plus.parts["tensor_inv_scale"].item() == 1.0
    assert plus.parts["scale"].flatten().tolist() == [0x7E, 1, 2, 3, 4, 5, 6, 7]
    assert unpacked(plus)[1].flatten().tolist() == [0, 0, 0, 3, 3, 3, 3, 3]
    codes_plus, codes_plain = unpacked(plus)[0], unpacked(plain)[0]
    assert torch.equal(codes_plus[1:3], codes_plain[1:3])
    assert codes_plus[3:, 3].tolist() == [4] * 5 and codes_plain[3:, 3].tolist() == [7] * 5  # 6 = 4 * (1 + 4/8)


@pytest.mark.parametrize("scale", ["fp16", "bf16", "fp32"])
def test_plus_over_a_wide_float_scale_is_not_plain(scale: str) -> None:
    """The plain encoding is for scale codes 0, 1, 2, not for scale values up to 2."""
    values = torch.zeros(16)
    values[5], values[6] = 0.7, 0.5
    packed = quantize(values, f"e2m1/16:{scale}:plus")
    assert packed.parts["index"].item() == 5
    assert unpacked(packed)[0][0, 5].item() == 4  # 6 = 4 * (1 + 4/8)
    assert dequantize(packed)[5].item() == pytest.approx(0.7, rel=2**-8)


@pytest.mark.parametrize("spec", ["mxfp4_plus", "mxfp6_plus", "mxfp8_plus"])
def test_finer_grids_contain_coarser_ones(spec: str) -> None:
    """Rounding to nearest, MX++ stores no element farther off than MX+, and MX+ none farther off than MX."""
    values = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    name = spec.removesuffix("_plus")
    chain = [{"mxfp6": "mxfp6_e2m3"}.get(name, name) + ":floor", spec, f"{spec}plus"]
    errors = [(fake_quantize(values, s) - values).abs() for s in chain]
    assert bool((errors[1] <= errors[0]).all()) and bool((errors[2] <= errors[1]).all())


# -------------------------------------------------------------------------------------------------- policies

POISONABLE = [
    *("mxfp4", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "mxint8", "nvfp4", "mxfp4_plus", "mxfp4_plusplus", "nvfp4_plus"),
    *("mxint4_plus", "int4/32:fp16:asym", "int4/32:fp32:asym(fp8)", "int4/32:bf16:asym(fp16)", "e2m1/32:fp16"),
    *("e2m1/32:fp32:rceil", "e2m1/32:e8m0:sub(8,2,linear)", "mxfp4:mse", "mxfp4:std", "mxfp4:percentile(99)"),
    *("mxfp4:stochastic(3)", "mxfp8:nonfinite", "e2m1/32:e5m0", "e2m1/16:e4m3:mse", "bf16/32:e8m0"),
]


def with_bad(bad: float, cols: int = 96) -> torch.Tensor:
    values = torch.randn(4, cols, generator=torch.Generator().manual_seed(9))
    values[1, 40] = bad
    values[3, 95] = -bad
    return values


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("spec", POISONABLE)
def test_nan_and_inf_poison_their_block_and_no_other(spec: str, bad: float) -> None:
    values = with_bad(bad)
    size = block_format(spec).block.size  # type: ignore[union-attr]
    is_poisoned = torch.zeros(4, 96, dtype=torch.bool)
    is_poisoned[1, 40 // size * size : 40 // size * size + size] = True
    is_poisoned[3, 96 - size :] = True
    restored = fake_quantize(values, spec)
    assert torch.equal(restored.isnan(), is_poisoned)
    clean = torch.where(is_poisoned, 0.0, values)
    expected = fake_quantize(clean, spec)
    assert same_bits(restored[~is_poisoned], expected[~is_poisoned])
    packed = quantize(values, spec)
    assert same_bits(dequantize(packed), restored)
    for name, part in quantize(clean, spec).parts.items():
        if name != "scale":
            assert same_bits(packed.parts[name], part), "a poisoned block has the codes of a zero block"


@pytest.mark.parametrize("spec", ["e4m3/4x8:e8m0", "int8/channel:fp32", "e4m3/tensor:fp32"])
def test_poison_in_other_blocks(spec: str) -> None:
    values = with_bad(math.nan, 96)
    is_poisoned = torch.zeros(4, 96, dtype=torch.bool)
    if "4x8" in spec:
        is_poisoned[:, 40:48] = True
        is_poisoned[:, 88:] = True
    elif "channel" in spec:
        is_poisoned[[1, 3]] = True
    else:
        is_poisoned[:] = True
    assert torch.equal(fake_quantize(values, spec).isnan(), is_poisoned)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "spec",
    [
        "mxfp4:nan_raise",
        "nvfp4:nan_raise",
        "e2m1/16:e4m3-none",
        "pair(mxfp4:nan_raise,mxfp8,50%)",
        "mxfp4:nan_raise+sparse1%:fp8",
    ],
)
def test_raise_names_the_tensor_and_counts(spec: str, bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"layers\.3\.weight holds 2 NaN or Inf values out of 384"):
        quantize(with_bad(bad), spec, name="layers.3.weight")
    with pytest.raises(NonFiniteError, match="the tensor holds 2"):
        fake_quantize(with_bad(bad), spec)


@pytest.mark.parametrize(
    "spec",
    [
        "mxfp4:inf_saturate",
        "mxfp8:inf_saturate",
        "mxint8:floor:inf_saturate",
        "mxfp4_plus:inf_saturate",
        "mxfp8:inf_saturate:nonfinite",
        "nvfp4:inf_saturate",
        "int4/32:fp32:asym:inf_saturate",
    ],
)
def test_inf_saturate_counts_as_the_largest_float32(spec: str) -> None:
    values = with_bad(math.inf)
    largest = values.clamp(-FLOAT32_MAX, FLOAT32_MAX)
    assert same_bits(fake_quantize(values, spec), fake_quantize(largest, spec))
    assert not fake_quantize(values, spec).isnan().any()
    values[0, 0] = math.nan
    restored = fake_quantize(values, spec)
    size = block_format(spec).block.size  # type: ignore[union-attr]
    assert restored[0, :size].isnan().all() and not restored[0, size:].isnan().any()


def test_inf_saturate_with_nan_raise_lets_infinity_pass() -> None:
    assert not fake_quantize(with_bad(math.inf), "mxfp4:inf_saturate:nan_raise").isnan().any()
    with pytest.raises(NonFiniteError):
        fake_quantize(with_bad(math.nan), "mxfp4:inf_saturate:nan_raise")


@pytest.mark.parametrize(
    "spec, value, restored",
    [
        ("mxfp8:floor:nonfinite", 463.9, 448.0),
        ("mxfp8:floor:nonfinite", 464.0, 448.0),  # a tie, and 0x7E is even
        ("mxfp8:floor:nonfinite", 464.1, math.nan),
        ("mxfp8:floor", 511.0, 448.0),
        ("mxfp8_e5m2:floor:nonfinite", -61439.0, -57344.0),
        ("mxfp8_e5m2:floor:nonfinite", -61440.0, -math.inf),  # a tie, and 0x7B is odd
        ("mxfp8_e5m2:floor", -65535.0, -57344.0),
        ("mxfp4", 7.99, 6.0),
    ],
)
def test_overflow_policies(spec: str, value: float, restored: float) -> None:
    got = fake_quantize(block_of({0: value, 1: 1.0}), spec)
    assert same_bits(got[:1], torch.tensor([restored]))
    assert got[1].isfinite(), "the element overflows, not its block"


def test_zero_blocks_and_negative_zero() -> None:
    zeros = torch.tensor([[0.0, -0.0] * 16])
    for spec in ("mxfp4", "mxfp6_e2m3", "mxfp8", "mxfp8_e5m2"):
        packed = quantize(zeros, spec)
        assert packed.parts["scale"].item() == 0
        assert same_bits(dequantize(packed), zeros), "-0 keeps its sign in float elements"
    for spec in ("mxint8", "nvfp4", "mxfp4_plus", "mxfp8_plusplus", "nvfp4_plus", "int4/32:fp16:asym", "e2m1/32:fp32"):
        packed = quantize(zeros, spec)
        assert not packed.parts["scale"].any() and not packed.parts["codes"].any()
        assert same_bits(dequantize(packed).abs(), torch.zeros(1, 32))
    small = block_of({0: 6.0, 1: -0.1, 2: -0.0})
    assert same_bits(fake_quantize(small, "mxfp4")[1:3], torch.tensor([-0.0, -0.0]))
    assert same_bits(fake_quantize(small, "nvfp4")[1:3], torch.tensor([-0.0, -0.0]))
    assert same_bits(fake_quantize(block_of({0: 1.0, 1: -0.001}), "mxint4")[1:2], torch.tensor([0.0]))
