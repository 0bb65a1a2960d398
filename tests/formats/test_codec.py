"""Encoding of single numbers: every neighbouring pair at and beside its midpoint, all roundings, special values."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from fractions import Fraction

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

from format_specs import block_format
from microscale.formats import (
    NAMED_ELEMENTS,
    Draw,
    Element,
    FloatElement,
    IntElement,
    Overflow,
    Rounding,
    SpecialValues,
    power_of_two_scale,
)
from microscale.formats.codec import (
    RANDOM_BITS,
    decode,
    decode_scale,
    encode,
    encode_scale,
    encode_scale_up,
    random_bits,
    round_to_int,
)
from microscale.formats.elements import BF16, E8M0, FP16, FP32
from vectors import exact

WIDE = ("fp16", "bf16")
NARROW = tuple(word for word in NAMED_ELEMENTS if word not in WIDE)
GENERIC = (
    *("e3m0", "e1m0", "e1m3", "e4m1", "e5m3", "e2m1-b5", "e4m3-b140", "e4m3-b-100", "e8m0"),
    *("e4m3-ieee", "e4m3-none", "e5m2-fn", "e5m2-none", "e2m1-ieee", "e3m1-fn", "e0m3-fn", "e8m2-b140"),
    *("ue4m3", "ue5m3", "ue2m1", "int4-full", "int8-full", "int8-f0", "int4-f-3", "uint4", "uint8-f3"),
)
GENERIC_WIDE = ("e5m10-b20", "e6m9", "ue5m10-none")
DETERMINISTIC = (Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY, Rounding.TOWARD_ZERO)
FLOAT32_MIN_SUBNORMAL = 2.0**-149


def element_of(word: str) -> Element:
    if word == "e8m0":
        return E8M0
    return block_format(f"{word}/32:fp32").element


@functools.cache
def magnitudes(element: Element) -> np.ndarray:
    """All magnitudes in ascending order, with the value after the largest as last entry (float64, exact)."""
    if isinstance(element, IntElement):
        steps = range(2 ** (element.bits - element.signed) + 2)
        return np.array([float(step * exact.two_to(-element.fraction_bits)) for step in steps])
    if element.bits <= 12:
        return np.array([float(v) for v in exact.grid(element)])
    codes = np.arange(exact.num_finite(element) + 1)
    field, mantissa = np.divmod(codes, 2**element.mantissa_bits)
    is_normal = field > 0
    return np.ldexp(
        mantissa + is_normal * 2.0**element.mantissa_bits,
        (np.where(is_normal, field, 1) - element.bias - element.mantissa_bits).astype(int),
    )


@functools.cache
def probes(element: Element) -> np.ndarray:
    """Every value, every midpoint, one float32 ulp beside both; both signs; and points past both ends."""
    values = magnitudes(element)
    middles = (values[:-1] + values[1:]) / 2
    points = np.concatenate([values, middles])
    points = points[points < 2.0**128]
    exactly = points.astype(np.float32).astype(np.float64) == points
    assert exactly[points >= FLOAT32_MIN_SUBNORMAL].all(), "a midpoint is not a float32"
    far = np.minimum([0.0, values[-1] * 1.5, 1e-45, 1e-40, 1.0, 1e30], 3.4028234663852886e38)
    single = np.concatenate([points, far]).astype(np.float32)
    with np.errstate(over="ignore"):
        up, down = np.nextafter(single, np.float32(np.inf)), np.nextafter(single, np.float32(-np.inf))
    everything = np.concatenate([single, up, down])
    everything = np.unique(everything[np.isfinite(everything) & (everything >= 0)])
    return np.concatenate([everything, -everything])


def expected_codes(element: Element, rounding: Rounding, overflow: Overflow, noise: np.ndarray | None) -> np.ndarray:
    points = probes(element)
    random = np.zeros(len(points), dtype=np.int64) if noise is None else noise
    return np.array(
        [
            exact.encode(abs(Fraction(float(x))), bool(np.signbit(x)), element, rounding, overflow, int(r))
            for x, r in zip(points, random, strict=True)
        ]
    )


def encode_probes(
    element: Element, rounding: Rounding, overflow: Overflow = Overflow.SATURATE, noise: np.ndarray | None = None
) -> np.ndarray:
    bits = None if noise is None else torch.from_numpy(noise)
    codes = encode(torch.from_numpy(probes(element)), element, rounding=rounding, overflow=overflow, noise=bits)
    assert codes.dtype == (torch.uint8 if element.bits <= 8 else torch.int32)
    return codes.numpy().astype(np.int64)


@pytest.mark.parametrize("rounding", DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize("word", [*NARROW, *GENERIC])
def test_every_neighbouring_pair_at_and_beside_its_midpoint(word: str, rounding: Rounding) -> None:
    element = element_of(word)
    np.testing.assert_array_equal(
        encode_probes(element, rounding), expected_codes(element, rounding, Overflow.SATURATE, None)
    )


def wide_codes(element: FloatElement, points: np.ndarray, rounding: Rounding) -> np.ndarray:
    """The vectorised oracle for elements with many codes: comparisons of float64 numbers, all of them exact."""
    values, size = magnitudes(element), np.abs(points.astype(np.float64))
    lower = np.clip(np.searchsorted(values, size, side="right") - 1, 0, len(values) - 2)
    middle = (values[lower] + values[lower + 1]) / 2
    up = (size > middle) | ((size == middle) & ((rounding is Rounding.NEAREST_AWAY) | (lower % 2 == 1)))
    if rounding is Rounding.TOWARD_ZERO:
        up = np.zeros_like(up)
    codes = np.minimum(lower + up, exact.num_finite(element) - 1)
    negative = np.signbit(points)
    if not element.signed:
        return np.where(negative, 0, codes)
    return codes | (negative.astype(np.int64) << (element.bits - 1))


@pytest.mark.parametrize("rounding", DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize("word", [*WIDE, *GENERIC_WIDE])
def test_every_neighbouring_pair_of_wide_elements(word: str, rounding: Rounding) -> None:
    element = element_of(word)
    assert isinstance(element, FloatElement)
    np.testing.assert_array_equal(encode_probes(element, rounding), wide_codes(element, probes(element), rounding))


def test_the_two_oracles_agree() -> None:
    for word in ("e4m3", "e3m4", "ue5m3"):
        element = element_of(word)
        assert isinstance(element, FloatElement)
        for rounding in DETERMINISTIC:
            np.testing.assert_array_equal(
                wide_codes(element, probes(element), rounding),
                expected_codes(element, rounding, Overflow.SATURATE, None),
            )


@pytest.mark.parametrize("rounding", DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize("word", ["e4m3", "e5m2", "e3m4", "e4m3-ieee", "e5m2-fn", "e2m1-ieee", "e3m1-fn", "e0m3-fn"])
def test_overflow_to_inf_or_nan(word: str, rounding: Rounding) -> None:
    element = element_of(word)
    got = encode_probes(element, rounding, Overflow.NONFINITE)
    np.testing.assert_array_equal(got, expected_codes(element, rounding, Overflow.NONFINITE, None))
    top = magnitudes(element)[-1]
    assert not np.isfinite([element.value(int(code)) for code in got[np.abs(probes(element)) >= top]]).any()


ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}


@pytest.mark.parametrize("word", ML_DTYPES)
def test_nearest_even_against_ml_dtypes(word: str) -> None:
    """ml_dtypes overflows to Inf or NaN where the type has one, and saturates in the others."""
    element = element_of(word)
    points = probes(element)
    storage = np.uint8 if element.bits <= 8 else np.uint16
    with np.errstate(over="ignore"):
        expected = points.astype(ML_DTYPES[word]).view(storage).astype(np.int64)
    has_special = isinstance(element, FloatElement) and element.specials is not SpecialValues.NONE
    overflow = Overflow.NONFINITE if has_special else Overflow.SATURATE
    np.testing.assert_array_equal(encode_probes(element, Rounding.NEAREST_EVEN, overflow), expected)


@pytest.mark.parametrize("dtype, word", [(torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2")])
def test_nearest_even_against_the_torch_casts(dtype: torch.dtype, word: str) -> None:
    element = element_of(word)
    points = torch.from_numpy(probes(element)).clamp(-element.max_value, element.max_value)
    expected = points.to(dtype).view(torch.uint8)
    assert torch.equal(encode(points, element), expected)


GFLOAT_MODES = {
    Rounding.NEAREST_EVEN: gfloat.RoundMode.TiesToEven,
    Rounding.NEAREST_AWAY: gfloat.RoundMode.TiesToAway,
    Rounding.TOWARD_ZERO: gfloat.RoundMode.TowardZero,
}


def gfloat_format(element: FloatElement) -> gfloat.FormatInfo:
    """The element as a gfloat record (its special values do not matter for saturating rounding of finite numbers)."""
    nans = {SpecialValues.NONE: 0, SpecialValues.FN: 1, SpecialValues.IEEE: 2**element.mantissa_bits - 1}
    is_ieee = element.specials is SpecialValues.IEEE
    return gfloat.FormatInfo(
        element.name,
        element.bits,
        element.mantissa_bits + 1,
        bias=element.bias,
        is_signed=element.signed,
        domain=gfloat.Domain.Extended if is_ieee else gfloat.Domain.Finite,
        has_nz=element.signed,
        num_high_nans=nans[element.specials],
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.mark.parametrize("rounding", DETERMINISTIC, ids=lambda r: r.value)
@pytest.mark.parametrize(
    "word", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e3m4", "e3m0", "e4m3-none", "e5m3", "e2m1-b5"]
)
def test_all_roundings_against_gfloat(word: str, rounding: Rounding) -> None:
    element = element_of(word)
    assert isinstance(element, FloatElement)
    points = probes(element)
    expected = gfloat.round_ndarray(gfloat_format(element), points.astype(np.float64), GFLOAT_MODES[rounding], sat=True)
    got = decode(encode(torch.from_numpy(points), element, rounding=rounding), element).numpy().astype(np.float64)
    np.testing.assert_array_equal(got.view(np.int64), np.asarray(expected, dtype=np.float64).view(np.int64))


def test_int8_against_gfloat() -> None:
    points = probes(NAMED_ELEMENTS["int8"]).astype(np.float64)
    info = gfloat.formats.format_info_ocp_int8
    expected = np.asarray(gfloat.round_ndarray(info, points, gfloat.RoundMode.TiesToEven, sat=True), dtype=np.float64)
    expected = expected.clip(-127 / 64, 127 / 64) + 0.0  # ours leaves the code of -2 unused
    got = decode(encode(torch.from_numpy(points).float(), NAMED_ELEMENTS["int8"]), NAMED_ELEMENTS["int8"])
    np.testing.assert_array_equal(got.numpy(), expected.astype(np.float32))


# --------------------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("word", [*NAMED_ELEMENTS, *GENERIC, *GENERIC_WIDE])
def test_nan_gets_the_nan_code_or_zero(word: str) -> None:
    element = element_of(word)
    nan = torch.tensor([math.nan, math.copysign(math.nan, -1.0)])
    codes = encode(nan, element).tolist()
    nan_code = element.nan_code if isinstance(element, FloatElement) else None
    if nan_code is None:
        magnitude_mask = 2 ** (element.bits - 1) - 1 if element.signed else -1
        assert [code & magnitude_mask for code in codes] == [0, 0]
    else:
        assert codes[0] == nan_code
        assert math.isnan(element.value(codes[1]))


@pytest.mark.parametrize("word", [*NAMED_ELEMENTS, *GENERIC])
def test_infinity_saturates(word: str) -> None:
    element = element_of(word)
    up, down = decode(encode(torch.tensor([math.inf, -math.inf]), element), element).tolist()
    assert up == element.max_value
    if not element.signed:
        assert down == (element.value(0))
    elif isinstance(element, IntElement):
        assert down == exact.decode(element, element.min_code % 2**element.bits)
    else:
        assert down == -element.max_value


@pytest.mark.parametrize("word", ["e4m3", "e5m2", "fp16", "bf16", "e3m4", "e4m3-ieee"])
def test_infinity_overflows_to_inf_or_nan(word: str) -> None:
    element = element_of(word)
    up, down = decode(
        encode(torch.tensor([math.inf, -math.inf]), element, overflow=Overflow.NONFINITE), element
    ).tolist()
    if word == "e4m3":
        assert math.isnan(up) and math.isnan(down)
    else:
        assert (up, down) == (math.inf, -math.inf)


@pytest.mark.parametrize("word", [*NAMED_ELEMENTS, *GENERIC])
def test_minus_zero(word: str) -> None:
    element = element_of(word)
    code = int(encode(torch.tensor([-0.0]), element))
    has_sign = isinstance(element, FloatElement) and element.signed
    assert code == (2 ** (element.bits - 1) if has_sign else 0)


@pytest.mark.parametrize("word", ["ue4m3", "ue5m3", "ue2m1", "uint4", "uint8-f3", "ue5m10-none"])
def test_unsigned_elements_take_negative_numbers_as_zero(word: str) -> None:
    negative = torch.tensor([-1e-45, -0.5, -1.0, -6.0, -1e30, -math.inf])
    for rounding in DETERMINISTIC:
        assert encode(negative, element_of(word), rounding=rounding).tolist() == [0] * 6


def test_every_finite_code_encodes_to_itself() -> None:
    for word in (*NAMED_ELEMENTS, *GENERIC, *GENERIC_WIDE):
        element = element_of(word)
        codes = torch.arange(2**element.bits, dtype=torch.int32)
        values = decode(codes, element)
        keep = torch.isfinite(values)
        if isinstance(element, IntElement) and element.signed and element.symmetric:
            keep &= codes != 2 ** (element.bits - 1)
        for rounding in Rounding:
            noise = torch.full_like(codes, 2**RANDOM_BITS - 1) if rounding is Rounding.STOCHASTIC else None
            again = encode(values, element, rounding=rounding, noise=noise).to(torch.int32)
            assert torch.equal(again[keep], codes[keep]), (word, rounding)
            if rounding is Rounding.STOCHASTIC:
                again = encode(values, element, rounding=rounding, noise=torch.zeros_like(codes)).to(torch.int32)
                assert torch.equal(again[keep], codes[keep]), (word, "noise 0")


def test_input_is_untouched_and_may_be_strided() -> None:
    values = torch.linspace(-8, 8, 60).reshape(6, 10)
    before = values.clone()
    for word in ("e2m1", "int4", "bf16"):
        element = element_of(word)
        assert torch.equal(encode(values.T, element), encode(values.T.contiguous(), element))
    assert torch.equal(values, before)


# ------------------------------------------------------------------------------------------ stochastic rounding


def spread_noise(count: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 2**RANDOM_BITS, count)


@pytest.mark.parametrize("word", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e0m3", "int4", "int8", "e3m0", "ue4m3"])
def test_stochastic_rounding_is_as_defined(word: str) -> None:
    element = element_of(word)
    noise = spread_noise(len(probes(element)))
    np.testing.assert_array_equal(
        encode_probes(element, Rounding.STOCHASTIC, noise=noise),
        expected_codes(element, Rounding.STOCHASTIC, Overflow.SATURATE, noise),
    )


@pytest.mark.parametrize(
    "word, value, lower, upper, probability",
    [
        ("e2m1", 2.25, 2.0, 3.0, 0.25),
        ("e2m1", -5.5, -4.0, -6.0, 0.75),
        ("e2m1", 0.1, 0.0, 0.5, 0.2),
        ("e4m3", 1.03125, 1.0, 1.125, 0.25),
        ("e4m3", 3 * 2.0**-11, 2.0**-9 * 0, 2.0**-9, 0.75),
        ("int8", 1 / 128, 0.0, 1 / 64, 0.5),
        ("int4", -0.3, -0.25, -0.5, 0.2),
        ("bf16", 1 + 2.0**-10, 1.0, 1 + 2.0**-7, 0.125),
    ],
)
def test_stochastic_probability(word: str, value: float, lower: float, upper: float, probability: float) -> None:
    """The share of numbers that go up lies within 5 standard deviations of a binomial around the probability."""
    element, count = element_of(word), 200_000
    for seed in (0, 1, 123456789):
        noise = random_bits(torch.arange(count), Draw(seed=seed))
        got = decode(encode(torch.full((count,), value), element, rounding=Rounding.STOCHASTIC, noise=noise), element)
        assert set(got.tolist()) <= {lower, upper}
        share = float((got == upper).double().mean())
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


def test_stochastic_thresholds_are_exact() -> None:
    """2.25 lies a quarter of the way from 2 to 3: exactly a quarter of all 2^24 random numbers sends it up."""
    noise = torch.tensor([0, 2**22 - 1, 2**22, 2**24 - 1])
    got = encode(torch.full((4,), 2.25), element_of("e2m1"), rounding=Rounding.STOCHASTIC, noise=noise)
    assert got.tolist() == [5, 5, 4, 4]


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**40 + 3, 2**63 - 1, 2**70])
def test_random_bits_follow_their_formula(seed: int) -> None:
    indices = [*range(64), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40]
    got = random_bits(torch.tensor(indices), Draw(seed=seed)).tolist()
    assert got == [exact.random_bits(index, seed) for index in indices]
    assert all(0 <= bits < 2**RANDOM_BITS for bits in got)


def test_random_bits_are_even_and_independent_of_order_and_seed() -> None:
    indices = torch.arange(1 << 17)
    first = random_bits(indices, Draw(seed=5))
    assert torch.equal(random_bits(indices.flip(0), Draw(seed=5)).flip(0), first)
    counts = torch.bincount(first >> 16, minlength=256).double()
    chi_square = float(((counts - 512) ** 2 / 512).sum())
    assert 128 < chi_square < 400, "256 bins of 512: mean 255, standard deviation 22.6"
    other = random_bits(indices, Draw(seed=6))
    correlation = float(torch.corrcoef(torch.stack([first.double(), other.double()]))[0, 1])
    assert abs(correlation) < 5 / math.sqrt(len(indices))


# --------------------------------------------------------------------------------------------- whole numbers


def half_steps() -> Iterator[float]:
    for whole in (0, 1, 2, 3, 7, 126, 127, 2**21):
        for part in (0.0, 0.25, 0.5, 0.75):
            yield from (whole + part, -(whole + part))


def test_round_to_int() -> None:
    values = list(half_steps())
    got = {mode: round_to_int(torch.tensor(values), mode).tolist() for mode in DETERMINISTIC}
    for place, value in enumerate(values):
        size, sign = abs(Fraction(value)), math.copysign(1, value)
        for mode in DETERMINISTIC:
            whole = math.floor(size)
            whole += exact.rounds_up(size - whole, whole, mode, 0)
            assert got[mode][place] == sign * whole
            assert math.copysign(1, got[mode][place]) == sign, "the sign stays, of zeros too"
    for mode in DETERMINISTIC:
        special = round_to_int(torch.tensor([math.nan, math.inf, -math.inf, 2.0**30]), mode)
        assert math.isnan(special[0]) and special[1:].tolist() == [math.inf, -math.inf, 2.0**30]


# ------------------------------------------------------------------------------------------------------ scales


@pytest.mark.parametrize(
    "scale, dtype",
    [
        (element_of("e4m3"), torch.uint8),
        (element_of("ue5m3"), torch.uint8),
        (FP16, torch.float16),
        (BF16, torch.bfloat16),
        (FP32, torch.float32),
    ],
    ids=["e4m3", "ue5m3", "fp16", "bf16", "fp32"],
)
def test_scales_are_stored_to_nearest_or_up_and_saturate(scale: FloatElement, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    raw = torch.rand(4000, generator=generator) * torch.exp2(torch.randint(-30, 20, (4000,), generator=generator))
    edges = [0.0, scale.min_value, scale.min_value / 2, scale.max_value, 3.4e38, 448.0, 460.0, 1e-45, 2.0**-10]
    raw = torch.cat([raw, torch.tensor(edges, dtype=torch.float32)])
    nearest, upward = encode_scale(raw, scale), encode_scale_up(raw, scale)
    assert nearest.dtype == upward.dtype == dtype
    near, up = decode_scale(nearest, scale), decode_scale(upward, scale)
    clipped = raw.clamp(max=scale.max_value)
    assert bool((up >= clipped).all()), "round-up never lies below"
    if scale != FP32:
        down = decode_scale(encode_scale(raw, scale, rounding=Rounding.TOWARD_ZERO), scale)
        assert bool((down <= clipped).all())
        between = (down < clipped) & (up > clipped)
        step = up.double() - down.double()
        assert torch.equal(between, step > 0), "up and down are the same exactly where the scale holds the number"
        assert bool(((near.double() - clipped.double()).abs() <= step / 2).all())
    else:
        assert torch.equal(near, raw) and torch.equal(up, raw)
    nan = decode_scale(encode_scale(torch.tensor([math.nan]), scale), scale)
    assert bool(nan.isnan()) == (scale.nan_code is not None)


def test_power_of_two_scales_encode_to_the_nearest_power() -> None:
    for scale in (E8M0, power_of_two_scale(5), power_of_two_scale(4, bias=3)):
        powers = torch.tensor([scale.value(code) for code in range(scale.max_code + 1)])
        assert encode(powers, scale).tolist() == list(range(scale.max_code + 1))
        assert encode(torch.tensor([0.0, 1e-45, 3.4e38]), scale).tolist()[:2] == [0, 0]
