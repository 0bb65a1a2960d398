"""Properties of quantize, dequantize and fake_quantize for all formats; where one does not hold, the test says why."""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from format_specs import block_format, parts_of
from microscale.formats import (
    NAMED_FORMATS,
    BlockFormat,
    ChannelBlock,
    Extension,
    FloatElement,
    IntElement,
    Rounding,
    RuleKind,
    VectorBlock,
    parse_format,
)
from microscale.formats.codec import decode_scale
from microscale.kernels import dequantize, fake_quantize, quantize
from microscale.layouts import unpack_bits
from vectors import exact
from vectors.inputs import matrices, same_bits

VARIANTS = (
    *("mxfp4:ceil", "mxfp4:rceil", "mxfp4:even", "mxfp4:threshold(7.25)", "mxfp4:prescale", "mxfp4:std", "mxfp4:mse"),
    *("mxfp4:percentile(99)", "mxfp8:floor", "mxfp8:even(1)", "mxint8:floor", "mxint8:even", "mxint4:nearest_away"),
    *("mxfp4:toward_zero", "mxfp4:stochastic(42)", "mxfp8:floor:nonfinite", "e3m2/16:e8m0:rceil", "e0m3/8:e8m0"),
    *("e2m1/20:e8m0:plus", "e2m1/16:e8m0:plusplus", "e2m1/256:e8m0:plus", "e2m1/16:fp16:plus", "int8/16:e4m3"),
    *("e2m1/16:ue5m3:nan_raise", "e2m1/16:e4m3:rceil", "int4/32:bf16", "e2m1/16:fp32:mse", "nvfp4:threshold(7)"),
    *("e4m3/4x8:e8m0", "int4/16x16:fp16", "nvfp4:stochastic(1)", "e2m1/3x5:e4m3+fp32", "int8/channel:fp32"),
    *("e4m3/channel:e8m0", "e4m3/tensor:fp32", "int8/tensor:e8m0", "bf16/32:e8m0", "fp16/16:fp32", "e5m10-b20/8:e8m0"),
    *(
        "e2m1/32:e8m0:sub(8,2,linear)",
        "e2m1/32:e8m0:sub(8,3,pow2)",
        "e2m1/16:e4m3+fp32:sub(4,1,pow2)",
        "int4-full/32:e8m0",
    ),
    *("int4/64:fp16:asym(fp8)", "int3/32:fp32:asym(fp16)", "int8/channel:fp32:asym", "int4/32:e4m3+fp32:asym(fp16)"),
    *("int5/4x8:bf16:asym", "mxfp4+sparse5%:fp8", "mxfp4_plus+sparse2.5%:fp16", "nvfp4+sparse1%:fp16"),
    *(
        "pair(mxfp4,mxfp8,25%)",
        "pair(mxfp4_plus,mxfp6_e2m3,50%)",
        "pair(int2/16:fp16:asym,e2m1/16:e4m3,10%)+sparse1%:fp8",
    ),
    *("pair(mxfp4,mxint8,0%)", "pair(mxfp4_plusplus,mxfp8,100%)", "e2m1/32:e5m0", "ue4m3/32:e8m0", "uint8/32:fp16"),
)
ALL = (*NAMED_FORMATS, *VARIANTS)
MODERATE = matrices(exponents=(-20, 20))


def same_numbers(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal values: 0 is -0, NaN is NaN."""
    return torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def row_of(*numbers: float) -> torch.Tensor:
    row = torch.zeros(32)
    row[: len(numbers)] = torch.tensor(numbers)
    return row


def is_signed_symmetric(spec: str) -> bool:
    for part in parts_of(parse_format(spec)):
        if part.zero_point is not None or not part.element.signed:
            return False
        if isinstance(part.element, IntElement) and not part.element.symmetric:
            return False
    return True


# ------------------------------------------------------------------------------------------- for every format


@pytest.mark.parametrize("spec", ALL)
@settings(max_examples=6, deadline=None)
@given(values=MODERATE)
def test_fake_quantize_is_dequantize_of_quantize_and_keeps_its_input(spec: str, values: torch.Tensor) -> None:
    before = values.clone()
    faked, packed = fake_quantize(values, spec), quantize(values, spec)
    assert same_bits(dequantize(packed), faked)
    assert same_bits(values, before), "the input is not modified"
    assert faked.shape == values.shape and faked.dtype == torch.float32
    assert same_bits(fake_quantize(values, spec), faked), "the same input gives the same bits"
    again = quantize(values, spec)
    assert all(same_bits(again.parts[name], part) for name, part in packed.parts.items())


@pytest.mark.parametrize("spec", ALL)
def test_shapes_dtypes_and_strides(spec: str) -> None:
    values = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        typed = values.to(dtype)
        faked, packed = fake_quantize(typed, spec), quantize(typed, spec)
        assert (faked.shape, faked.dtype) == (typed.shape, dtype)
        assert (packed.shape, packed.dtype, packed.rows, packed.cols) == ((3, 2, 40), dtype, 6, 40)
        wide = fake_quantize(typed.float(), spec)
        assert same_bits(faked, wide.to(dtype)), "a narrow input gives the numbers of the same float32 input"
        assert same_bits(dequantize(packed, torch.float32), wide)
        assert dequantize(packed, torch.float16).dtype == torch.float16
    assert same_bits(fake_quantize(values.reshape(6, 40), spec).reshape(3, 2, 40), fake_quantize(values, spec))
    strided = values.transpose(0, 1)
    assert same_bits(fake_quantize(strided, spec), fake_quantize(strided.contiguous(), spec))
    vector = values[0, 0]
    assert same_bits(fake_quantize(vector, spec), fake_quantize(vector.reshape(1, 40), spec)[0])
    one = torch.tensor([1.5])
    assert fake_quantize(one, spec).shape == (1,)
    assert same_bits(dequantize(quantize(one, spec)), fake_quantize(one, spec))
    assert not fake_quantize(values.clone().requires_grad_(), spec).requires_grad


@pytest.mark.parametrize("spec", [spec for spec in ALL if is_signed_symmetric(spec)])
@settings(max_examples=6, deadline=None)
@given(values=MODERATE)
def test_changing_all_signs_changes_all_signs(spec: str, values: torch.Tensor) -> None:
    """Not with a zero point (two ends), unsigned elements (one sign) or full integers (one code more below).

    0 and -0 are compared as equal: integers and cleared blocks have no -0.
    """
    assert same_numbers(fake_quantize(-values, spec), -fake_quantize(values, spec))


def commutes_with_powers_of_two(spec: str) -> bool:
    """Not where a scale of a narrow range reaches its end: fp16, e4m3 and the like without a level per tensor."""
    fmt = parse_format(spec)
    for part in parts_of(fmt):
        if not (part.scale.exponent_bits == 8 or part.tensor_scale is not None):
            return False
    return fmt.sparse is None or fmt.sparse.element.value == "fp8"


@pytest.mark.parametrize("spec", [spec for spec in ALL if commutes_with_powers_of_two(spec)])
@settings(max_examples=6, deadline=None)
@given(values=matrices(exponents=(-4, 4)), shift=st.integers(-30, 30))
def test_scaling_by_a_power_of_two_scales_the_result(spec: str, values: torch.Tensor, shift: int) -> None:
    factor = 2.0**shift
    assert same_numbers(fake_quantize(values * factor, spec), fake_quantize(values, spec) * factor)


def rows_stand_alone(spec: str) -> bool:
    """Not with a level, a table or a bitmap of the whole tensor, tiles, or random bits by place in the tensor."""
    fmt = parse_format(spec)
    if not isinstance(fmt, BlockFormat) or fmt.sparse is not None or fmt.tensor_scale is not None:
        return False
    return isinstance(fmt.block, VectorBlock | ChannelBlock) and fmt.rounding is not Rounding.STOCHASTIC


@pytest.mark.parametrize("spec", [spec for spec in ALL if rows_stand_alone(spec)])
@settings(max_examples=5, deadline=None)
@given(values=matrices(rows=(2, 4), exponents=(-20, 20)))
def test_rows_are_independent(spec: str, values: torch.Tensor) -> None:
    together = quantize(values, spec)
    for row in range(values.shape[0]):
        alone = quantize(values[row : row + 1], spec)
        for name, part in alone.parts.items():
            assert same_bits(part, together.parts[name][row : row + 1])


def pads_with_zeros(spec: str) -> bool:
    """Not for channel and tensor blocks (never padded) or sparse tables (a share of the unpadded tensor)."""
    fmt = parse_format(spec)
    return not isinstance(parts_of(fmt)[0].block, ChannelBlock) and fmt.sparse is None and "tensor:" not in spec


@pytest.mark.parametrize("spec", [spec for spec in ALL if pads_with_zeros(spec)])
@settings(max_examples=5, deadline=None)
@given(values=matrices(rows=(1, 5), exponents=(-20, 20)))
def test_ragged_widths_are_zero_padding(spec: str, values: torch.Tensor) -> None:
    packed = quantize(values, spec)
    block = parts_of(packed.format)[0].block
    width = block.size if isinstance(block, VectorBlock) else block.cols  # type: ignore[union-attr]
    cols = values.shape[1]
    padded = torch.nn.functional.pad(values, (0, -cols % width))
    expected = quantize(padded, spec)
    for name, part in packed.parts.items():
        assert same_bits(part, expected.parts[name])
    assert same_bits(dequantize(packed), dequantize(expected)[:, :cols])


# -------------------------------------------------------------------------------------------- quantizing twice

ELEMENTS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e3m4", "int8", "int4", "e0m3", "e3m0")
ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero")
REQUANTIZABLE = [
    *(f"{e}/32:e8m0:{rule}:{mode}" for e in ELEMENTS for rule in ("floor", "ceil", "rceil") for mode in ROUNDINGS),
    *(f"{e}/32:e8m0:even" for e in ELEMENTS),
    *("mxfp4:threshold(7)", "mxfp4:threshold(7.25)", "mxfp4:mse", "int8/16:e8m0:mse(-1,1)"),
    *("e4m3/4x8:e8m0:floor", "e2m1/channel:e8m0:rceil", "e2m1/tensor:e8m0:even"),
]


@pytest.mark.parametrize("spec", REQUANTIZABLE)
@settings(max_examples=8, deadline=None)
@given(values=matrices(rows=(2, 4), cols=(32, 70), exponents=(-148, 110)))
def test_requantizing_changes_nothing(spec: str, values: torch.Tensor) -> None:
    """The scale may shrink when the maximum rounds down to a power of two, but then all values fit the finer grid.

    ``even`` holds when rounding to nearest: toward zero, E4M3's 248 becomes 240, which the finer scale cannot hold.
    """
    once = fake_quantize(values, spec)
    assert same_bits(fake_quantize(once, spec), once)


@pytest.mark.parametrize(
    "spec, numbers",
    [
        ("mxfp4:prescale", [5.5 * 4 / 3, 0.5]),  # 5.5 rounds to 6: 6 * 4/3 = 8 lies in the next binade
        ("mxfp8:even(1)", [440.0, 2.0**-9]),  # rounds to 448, where the scale of compressed-tensors doubles
        ("mxfp8:even:toward_zero", [249.0]),  # becomes 240, which the finer scale clips to 224
        ("mxfp4:threshold(12)", [7.0]),  # saturates to 6 = t / 2, which the finer scale clips to 3
        ("mxfp8:threshold(480)", [241.0]),  # rounds to 240 = t / 2, which the finer scale clips to 224
        ("mxfp4:std(9)", [0.75, 0.125, -0.875, 1.5]),
        ("mxfp4:percentile(90)", [6.0, 6.0, 6.0, 3.2]),
        ("mxfp4_plus", [5.1, 5.05]),  # the largest becomes 5, its neighbour 6
        ("mxfp4_plusplus", [5.1, 5.05]),
        ("nvfp4", [2688.0, *[0.0] * 15, 3.2 * 2.0**-9]),  # 3 / 6 * 2^-9 is a tie that goes to scale 0
        ("int4/32:fp16:asym", [-0.875, 1.125, -1.125, 0.125]),
    ],
)
def test_where_requantizing_does_change_values(spec: str, numbers: list[float]) -> None:
    """A counter-example for each, so that nobody relies on more than holds."""
    once = fake_quantize(row_of(*numbers), spec)
    assert not torch.equal(fake_quantize(once, spec), once)


# ------------------------------------------------------------------------------------------------- error bound

BOUNDED = [
    *("mxfp4", "mxfp4:rceil", "mxfp4:even", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "mxfp8:floor", "mxfp8_e5m2", "mxint8"),
    *("mxint4", "mxint8:floor", "e0m3/32:e8m0", "e3m0/16:e8m0", "int4-full/32:e8m0", "bf16/32:e8m0", "e4m3/4x8:e8m0"),
    *("nvfp4", "e2m1/16:e4m3", "int8/channel:fp32", "int4/32:bf16", "e2m1/16:fp16:rceil", "mxfp4:prescale"),
    *("mxfp4:nearest_away", "mxint8:nearest_away"),
]


@pytest.mark.parametrize("spec", BOUNDED)
@settings(max_examples=5, deadline=None)
@given(values=matrices(exponents=(-20, 20)))
def test_the_error_is_at_most_half_a_step(spec: str, values: torch.Tensor) -> None:
    """|x - q| <= step / 2 where x / factor does not clip; a float factor adds two roundings to float32."""
    check_steps(spec, values, Fraction(1, 2))


@pytest.mark.parametrize(
    "spec", ["mxfp4:toward_zero", "mxint8:toward_zero", "mxfp8:stochastic(3)", "mxint4:stochastic(4)"]
)
@settings(max_examples=5, deadline=None)
@given(values=matrices(exponents=(-20, 20)))
def test_the_error_of_directed_and_stochastic_rounding_is_below_one_step(spec: str, values: torch.Tensor) -> None:
    check_steps(spec, values, Fraction(1))


def check_steps(spec: str, values: torch.Tensor, share: Fraction) -> None:
    fmt = block_format(spec)
    packed = quantize(values, fmt)
    restored = dequantize(packed)
    stored = decode_scale(packed.parts["scale"], fmt.scale).double() * fmt.rule.multiplier
    if fmt.tensor_scale is not None:
        stored = stored / packed.parts["tensor_inv_scale"].double()
    is_exact = fmt.scale.is_power_of_two and fmt.rule.multiplier == 1.0
    slack = Fraction(0) if is_exact else Fraction(1, 2**21)
    tile_rows = getattr(fmt.block, "rows", 1)
    tile_cols = getattr(fmt.block, "size", getattr(fmt.block, "cols", values.shape[1]))
    top = exact.max_magnitude(fmt.element)
    for row in range(values.shape[0]):
        for col in range(values.shape[1]):
            factor = Fraction(float(stored[row // tile_rows, col // tile_cols]))
            value = abs(Fraction(float(values[row, col])))
            if not factor or value > top * factor:
                continue
            error = abs(Fraction(float(restored[row, col])) - Fraction(float(values[row, col])))
            assert error <= exact.step_at(value / factor, fmt.element) * factor * share + value * slack


# -------------------------------------------------------------------------------------- eight edge cases of peers


@pytest.mark.parametrize(
    "rule, restored", [("floor", 6.0), ("even", 8.0), ("rceil", 8.0), ("ceil", 8.0), ("threshold(7)", 6.0)]
)
def test_a_maximum_between_6_and_8(rule: str, restored: float) -> None:
    assert fake_quantize(row_of(7.0), f"mxfp4:{rule}")[0].item() == restored


@pytest.mark.parametrize(
    "rounding, restored",
    [
        ("nearest_even", [0, 1, 1, 2, 2, 4, 4]),
        ("nearest_away", [0.5, 1, 1.5, 2, 3, 4, 6]),
        ("toward_zero", [0, 0.5, 1, 1.5, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_ties_of_e2m1(rounding: str, restored: list[float], sign: int) -> None:
    block = row_of(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0) * sign
    assert fake_quantize(block, f"mxfp4:{rounding}")[:7].abs().tolist() == restored


def test_nan_beside_finite_numbers_poisons() -> None:
    assert fake_quantize(row_of(1.0, math.nan), "mxfp4").isnan().all()
    assert quantize(row_of(1.0, math.nan), "mxfp4").parts["scale"].item() == 255


@pytest.mark.parametrize(
    "rule, restored", [("floor", 1.5 * 2.0**127), ("rceil", math.inf), ("even", math.inf), ("ceil", math.inf)]
)
def test_numbers_close_to_the_largest_float32(rule: str, restored: float) -> None:
    """floor saturates at 6 * 2^125; the others round 3e38 to 2^128, which is Inf in float32. The codes are finite."""
    packed = quantize(row_of(3e38), f"mxfp4:{rule}")
    assert dequantize(packed)[0].item() == restored
    assert packed.parts["scale"].item() < 255


def test_a_zero_block_reads_plus_zero() -> None:
    assert same_bits(fake_quantize(torch.zeros(32), "mxfp4"), torch.zeros(32))


# ----------------------------------------------------------------------------------------- asymmetric integers

ASYM_SPECS = [
    f"int{bits}/{size}:{scale}:asym({zero})"
    for bits, size, scale in [(4, 32, "fp16"), (2, 16, "fp32"), (3, 64, "bf16"), (8, 32, "fp32"), (5, 8, "e4m3+fp32")]
    for zero in ("int", "fp8", "fp16")
]


def asymmetric_oracle(
    block: list[float], fmt: BlockFormat, inv_scale: float | None
) -> tuple[list[float], float, float]:
    """S = (max - min) / (2^b - 1) and Z = round(-min / S) with float32 steps; the values, S and Z."""
    f32 = np.float32
    assert fmt.zero_point is not None and isinstance(fmt.element, IntElement)
    top = fmt.element.max_code
    low, high = f32(min(block)), f32(max(block))

    def range_step(low: np.float32, high: np.float32) -> np.float32:
        return f32(high - low) / f32(top) or abs(low)

    raw = range_step(low, high)
    limit = {"int": 0, "fp8": 448, "fp16": 65504}[fmt.zero_point.value]
    if abs(low) > f32(limit) * raw:
        low, high = min(low, f32(0)), max(high, f32(0))
        raw = range_step(low, high)
    wanted = raw if inv_scale is None else raw * f32(inv_scale)
    scale = (
        float(wanted)
        if fmt.scale.bits == 32
        else exact.decode(fmt.scale, exact.encode(Fraction(float(wanted)), False, fmt.scale))
    )
    factor = f32(scale) if inv_scale is None else f32(scale) / f32(inv_scale)
    if factor == 0:
        zero = f32(0)
    else:
        zero = f32(np.rint(-low / factor))
    if fmt.zero_point.value == "int":
        zero = min(max(zero, f32(0)), f32(top))
    else:
        element = block_format("e4m3/32:fp32" if fmt.zero_point.value == "fp8" else "fp16/32:fp32").element
        zero = f32(exact.decode(element, exact.encode(abs(Fraction(float(zero))), bool(np.signbit(zero)), element)))
    codes = [min(max(f32(np.rint((f32(x) / factor if factor else f32(0)) + zero)), f32(0)), f32(top)) for x in block]
    return [float((code - zero) * factor) for code in codes], float(factor), float(zero)


@pytest.mark.parametrize("spec", ASYM_SPECS)
@settings(max_examples=8, deadline=None)
@given(values=matrices(cols=(1, 70), exponents=(-6, 6)), offset=st.sampled_from([0.0, 0.0, 1.0, -3.0, 100.0, -20.0]))
def test_asymmetric_integers(spec: str, values: torch.Tensor, offset: float) -> None:
    fmt = block_format(spec)
    assert isinstance(fmt.block, VectorBlock)
    size = fmt.block.size
    padded = torch.nn.functional.pad(values + offset, (0, -values.shape[1] % size))
    packed = quantize(padded, fmt)
    inv_scale = packed.parts["tensor_inv_scale"].item() if fmt.tensor_scale is not None else None
    restored = dequantize(packed)
    for row in range(padded.shape[0]):
        for start in range(0, padded.shape[1], size):
            expected, _, _ = asymmetric_oracle(padded[row, start : start + size].tolist(), fmt, inv_scale)
            assert torch.equal(restored[row, start : start + size], torch.tensor(expected))


@pytest.mark.parametrize("constant", [0.0, 1.0, -1.0, 0.375, -6.5, 1000.0])
@pytest.mark.parametrize(
    "spec", ["int4/32:fp32:asym", "int4/32:fp32:asym(fp8)", "int4/32:fp32:asym(fp16)", "int2/32:fp32:asym(fp8)"]
)
def test_constant_blocks(spec: str, constant: float) -> None:
    """One repeated number c gets S = |c| (or c / (2^b - 1) with an integer zero point), which a wide scale holds."""
    restored = fake_quantize(torch.full((2, 32), constant), spec)
    assert torch.allclose(restored, torch.full((2, 32), constant), rtol=2**-22, atol=0)
    if spec != "int4/32:fp32:asym":
        assert bool((restored == constant).all())


def test_all_positive_blocks_use_their_whole_range_with_a_float_zero_point() -> None:
    values = torch.linspace(10, 11, 32).reshape(1, 32)
    widened = (fake_quantize(values, "int4/32:fp32:asym") - values).abs().max().item()
    exact_zero = (fake_quantize(values, "int4/32:fp32:asym(fp16)") - values).abs().max().item()
    assert widened > 0.3, "with 0 in the range a step is 11/15"
    assert exact_zero <= 0.5 / 15 * 1.0001
    packed = quantize(values, "int4/32:fp32:asym(fp16)")
    assert packed.parts["zero_point"].item() == -150.0


@pytest.mark.parametrize(
    "spec", ["int4/32:fp16:asym", "int4/32:fp16:asym(fp8)", "int4/32:fp16:asym(fp16)", "int4_asym_fp8"]
)
@pytest.mark.parametrize("offset", [0.0, 0.5, -2.0, 10.0, 1000.0])
def test_far_from_zero_asymmetric_integers_stay_close(spec: str, offset: float) -> None:
    """Z in E4M3 is off by up to 1/16 of itself; one past 448 would saturate, so the range is widened instead."""
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(4)) * 0.1 + offset
    error = (fake_quantize(values, spec) - values).abs().amax(-1)
    spread = values.amax(-1) - values.amin(-1)
    assert bool((error <= values.abs().amax(-1) / 16 + spread).all())


@pytest.mark.parametrize("zero", ["fp8", "fp16"])
@pytest.mark.parametrize("scale", ["fp16", "fp32"])
@pytest.mark.parametrize("base", [1000.0, -1000.0, 1.0])
def test_zero_points_past_their_type_widen_the_range(zero: str, scale: str, base: float) -> None:
    """Blocks that hardly vary: |Z| = 15 |min| / (max - min) past 448 or 65504, or a scale that underflows fp16."""
    values = torch.full((1, 32), base)
    values[0, 3:9] += abs(base) * 2.0**-20
    restored = fake_quantize(values, f"int4/32:{scale}:asym({zero})")
    assert torch.allclose(restored, values, rtol=2**-10, atol=0)
    widened = fake_quantize(values, f"int4/32:{scale}:asym")
    assert same_numbers(restored, widened)


# ------------------------------------------------------------------------------------------------ sub-group scales


@pytest.mark.parametrize("kind", ["linear", "pow2"])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@settings(max_examples=8, deadline=None)
@given(values=matrices(cols=(32, 32), exponents=(-20, 20)))
def test_sub_scales_are_the_smallest_that_do_not_clip(kind: str, bits: int, values: torch.Tensor) -> None:
    fmt = block_format(f"e2m1/32:e8m0:sub(8,{bits},{kind})")
    packed = quantize(values, fmt)
    codes = unpack_bits(packed.parts["sub_scale"], bits, 4)
    for row in range(values.shape[0]):
        factor = exact.two_to(int(packed.parts["scale"][row, 0]) - 127)
        for group in range(4):
            amax = max(abs(Fraction(float(v))) for v in values[row, 8 * group : 8 * group + 8])
            factors = [exact.two_to(-k) if kind == "pow2" else Fraction(k + 1, 2**bits) for k in range(2**bits)]
            fitting = [k for k, f in enumerate(factors) if amax <= f * factor * 6 and float(f) * float(factor) > 0]
            whole = 0 if kind == "pow2" else 2**bits - 1
            got = int(codes[row, group])
            if not amax:
                assert not dequantize(packed)[row, 8 * group : 8 * group + 8].any()
            elif not fitting:
                assert got == whole
            else:
                assert factors[got] == min(factors[k] for k in fitting)


def test_sub_scales_lower_the_error() -> None:
    values = torch.randn(100, 64, generator=torch.Generator().manual_seed(6))
    base = (fake_quantize(values, "mxfp4:rceil") - values).square().mean()
    for spec in ("mxfp4:rceil:sub(8,2,linear)", "mxfp4:rceil:sub(8,2,pow2)"):
        assert (fake_quantize(values, spec) - values).square().mean() < base


# ---------------------------------------------------------------------------------------------- stochastic


def test_stochastic_rounding_is_unbiased_and_seeded() -> None:
    values = torch.full((2000, 32), 1.3)
    values[:, 0] = 4.0
    got = fake_quantize(values, "mxfp4:stochastic(5)")[:, 1:]
    assert set(got.unique().tolist()) == {1.0, 1.5}
    sigma = 0.5 * math.sqrt(0.6 * 0.4 / got.numel())
    assert abs(got.double().mean().item() - 1.3) < 5 * sigma
    assert not torch.equal(got, fake_quantize(values, "mxfp4:stochastic(6)")[:, 1:])
    assert not torch.equal(got[0], got[1]), "every place has its own bits"


def test_stochastic_rounding_leaves_representable_numbers() -> None:
    for name in ("mxfp4", "mxfp8:floor", "mxint8:floor", "mxfp6_e3m2"):
        once = fake_quantize(torch.randn(20, 64, generator=torch.Generator().manual_seed(3)), name)
        for seed in (0, 1, 99):
            assert same_bits(fake_quantize(once, f"{name}:stochastic({seed})"), once)


def test_the_lists_above_cover_every_option() -> None:
    kinds: set[object] = set()
    for spec in ALL:
        fmt = parse_format(spec)
        for part in parts_of(fmt):
            kinds |= {
                part.rule.kind,
                part.extension,
                part.rounding,
                part.zero_point,
                type(part.block),
                type(part.element),
            }
            kinds.add(part.sub_scale.kind if part.sub_scale else None)
        kinds.add(fmt.sparse.element if fmt.sparse else None)
    assert set(RuleKind) <= kinds and set(Extension) <= kinds and set(Rounding) <= kinds
    assert {FloatElement, IntElement, ChannelBlock, VectorBlock} <= kinds


# ------------------------------------------------------------------------------------------- rows in pieces

PIECE_SPECS = [
    *NAMED_FORMATS,
    "e2m1/channel:fp16",
    "e4m3/tensor:fp32",
    "e2m1/3x16:e8m0",
    "mxfp4:stochastic(3)",
    "e2m1/16:e4m3+fp32:threshold(7)",
    "e2m1/16:e4m3+fp32:mse",
    "nvfp4:inf_saturate",
    "int4/32:e4m3+fp32:asym",
]


def rows_of_all_sizes(is_finite: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(23, 72, generator=generator) * torch.logspace(-3, 3, 23).unsqueeze(1)
    if not is_finite:
        rows[2, 5], rows[11, 40], rows[20, 71] = float("nan"), float("inf"), -float("inf")
    return rows.to(torch.bfloat16)


@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("spec", PIECE_SPECS)
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, spec: str, is_finite: bool) -> None:
    fmt, tensor = parse_format(spec), rows_of_all_sizes(is_finite)
    whole = quantize(tensor, fmt)
    expected = dequantize(whole)
    monkeypatch.setattr(sys.modules["microscale.kernels.reference.quantize"], "PIECE_ELEMENTS", 72 * 4)
    pieces = quantize(tensor, fmt)
    for name, part in whole.parts.items():
        assert torch.equal(pieces.parts[name].view(torch.uint8), part.view(torch.uint8)), name
    torch.testing.assert_close(dequantize(whole), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(fake_quantize(tensor, fmt), expected, rtol=0, atol=0, equal_nan=True)


def test_a_given_amax_is_cut_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, fmt = rows_of_all_sizes(True), parse_format("e4m3/channel:fp32")
    amax = torch.linspace(1, 5, 23).unsqueeze(1)
    whole = quantize(tensor, fmt, amax=amax)
    monkeypatch.setattr(sys.modules["microscale.kernels.reference.quantize"], "PIECE_ELEMENTS", 72 * 4)
    pieces = quantize(tensor, fmt, amax=amax)
    assert all(torch.equal(pieces.parts[name], part) for name, part in whole.parts.items())
