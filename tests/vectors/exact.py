"""A second, independent implementation of the formats in exact arithmetic: the oracle of the tests.

Everything here works on one number or one block at a time with Python fractions, from the fields of a format
record alone; nothing of microscale's codec or kernels is called. Where the contract itself rounds to float32 (a
float scale, its division), NumPy float32 scalars do that one step.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from microscale.formats import (
    BlockFormat,
    Element,
    Extension,
    FloatElement,
    IntElement,
    Overflow,
    Rounding,
    RuleKind,
    SpecialValues,
)

FLOAT32_MAX = Fraction(2**24 - 1) * Fraction(2) ** 104
HALF = Fraction(1, 2)


def two_to(exponent: int) -> Fraction:
    """2^exponent, exactly."""
    return Fraction(2) ** exponent


def floor_log2(value: Fraction) -> int:
    """floor(log2(value)) of a positive fraction, exactly."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if two_to(guess) <= value else guess - 1


def ceil_log2(value: Fraction) -> int:
    """ceil(log2(value)) of a positive fraction, exactly."""
    floor = floor_log2(value)
    return floor if two_to(floor) == value else floor + 1


# ---------------------------------------------------------------------------------------------------- elements


def num_finite(element: FloatElement) -> int:
    """How many codes of one sign are finite numbers."""
    top = 2 ** (element.exponent_bits + element.mantissa_bits)
    return (
        top
        - {SpecialValues.FN: 1, SpecialValues.IEEE: 2**element.mantissa_bits, SpecialValues.NONE: 0}[element.specials]
    )


def magnitude(element: FloatElement, code: int) -> Fraction:
    """The value of a code without its sign, as if no code were special."""
    field, mantissa = divmod(code, 2**element.mantissa_bits)
    if field == 0 and element.subnormals:
        return mantissa * two_to(1 - element.bias - element.mantissa_bits)
    return (2**element.mantissa_bits + mantissa) * two_to(field - element.bias - element.mantissa_bits)


@functools.lru_cache(maxsize=64)
def grid(element: FloatElement) -> tuple[Fraction, ...]:
    """Every finite magnitude by code, and as last entry the value that would follow the largest."""
    return tuple(magnitude(element, code) for code in range(num_finite(element) + 1))


def decode(element: Element, code: int) -> float:
    """The number that a bit pattern stands for (exact: every one is a float64)."""
    if isinstance(element, IntElement):
        whole = code - 2**element.bits if element.signed and code >= 2 ** (element.bits - 1) else code
        return float(whole * two_to(-element.fraction_bits))
    magnitude_bits = element.exponent_bits + element.mantissa_bits
    sign = -1.0 if element.signed and code >> magnitude_bits else 1.0
    code &= 2**magnitude_bits - 1
    if code < num_finite(element):
        return sign * float(magnitude(element, code))
    is_inf = element.specials is SpecialValues.IEEE and code == num_finite(element)
    return sign * math.inf if is_inf else math.nan


def rounds_up(position: Fraction, lower_code: int, rounding: Rounding, noise: int) -> bool:
    """Whether a number at ``position`` (0 to 1) between two neighbouring codes goes to the upper one."""
    if rounding is Rounding.TOWARD_ZERO:
        return False
    if rounding is Rounding.STOCHASTIC:
        return position > Fraction(noise, 2**24)
    if position != HALF:
        return position > HALF
    return rounding is Rounding.NEAREST_AWAY or lower_code % 2 == 1


def encode(
    value: Fraction,
    negative: bool,
    element: Element,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    noise: int = 0,
) -> int:
    """The code of the finite number (-1)^negative * value, value >= 0."""
    if isinstance(element, IntElement):
        steps = value * two_to(element.fraction_bits)
        whole = math.floor(steps)
        whole += rounds_up(steps - whole, whole, rounding, noise)
        top = 2 ** (element.bits - element.signed) - 1
        low = 0 if not element.signed else -top if element.symmetric else -top - 1
        return max(low, min(top, -whole if negative else whole)) % 2**element.bits
    if negative and not element.signed:
        return 0
    values = grid(element)
    last = len(values) - 1
    lower = bisect.bisect_right(values, value) - 1
    if lower < 0:
        code = 0  # a pure power-of-two element has no zero: its smallest value is the nearest
    elif lower == last:
        code = last
    else:
        position = (value - values[lower]) / (values[lower + 1] - values[lower])
        code = lower + rounds_up(position, lower, rounding, noise)
    if code == last:
        if overflow is Overflow.SATURATE:
            code = last - 1
        else:  # Inf where there is one, else NaN: both stand right after the largest value
            assert element.specials is not SpecialValues.NONE
    return code | negative << (element.exponent_bits + element.mantissa_bits)


def step_at(value: Fraction, element: Element) -> Fraction:
    """The distance of the two neighbouring values around a magnitude that does not clip."""
    if isinstance(element, IntElement):
        return two_to(-element.fraction_bits)
    values = grid(element)
    lower = min(bisect.bisect_right(values, value) - 1, len(values) - 2)
    return values[lower + 1] - values[lower]


# ------------------------------------------------------------------------------------------------- scale rules


def max_magnitude(element: Element) -> Fraction:
    """The largest value."""
    if isinstance(element, IntElement):
        return (2 ** (element.bits - element.signed) - 1) * two_to(-element.fraction_bits)
    return magnitude(element, num_finite(element) - 1)


def precision_bits(element: Element) -> int:
    """Fraction bits below the leading bit of the largest value."""
    if isinstance(element, FloatElement):
        return element.mantissa_bits
    return element.bits - element.signed - 1


def nearest_rank(block: list[Fraction], percent: float) -> Fraction:
    """The percentile by nearest rank of the magnitudes, with the decimal that was written."""
    rank = max(1, math.ceil(Fraction(repr(percent)) / 100 * len(block)))
    return sorted(block)[rank - 1]


def rule_exponent(block: list[Fraction], fmt: BlockFormat) -> int | None:
    """The exponent that a power-of-two rule asks for, before clipping; None for a block of zeros.

    ``block`` holds magnitudes.
    """
    element, rule, amax = fmt.element, fmt.rule, max(block)
    kind, arguments = rule.kind, [Fraction(argument) for argument in rule.arguments]
    top = max_magnitude(element)
    if kind is RuleKind.PERCENTILE:
        clip = nearest_rank(block, rule.arguments[0])
        return ceil_log2(clip / top) if clip else None
    if not amax:
        return None
    e_max = floor_log2(top)
    match kind:
        case RuleKind.FLOOR | RuleKind.PRESCALE:
            return floor_log2(amax) - e_max
        case RuleKind.CEIL:
            return ceil_log2(amax) - e_max
        case RuleKind.RCEIL:
            return ceil_log2(amax / top)
        case RuleKind.THRESHOLD:
            return ceil_log2(amax / arguments[0])
        case RuleKind.EVEN:
            bits = int(arguments[0]) if arguments else precision_bits(element)
            exponent = floor_log2(amax)
            half_up = math.floor(amax / two_to(exponent - bits) + HALF)
            return floor_log2(half_up * two_to(exponent - bits)) - e_max
        case _:
            raise AssertionError(f"{kind} looks at more than amax and has an oracle of its own")


def scale_code(exponent: int | None, scale: FloatElement) -> int:
    """The stored code of a power-of-two scale, clipped at both ends."""
    return 0 if exponent is None else max(0, min(num_finite(scale) - 1, exponent + scale.bias))


# ------------------------------------------------------------------------------------------------ whole blocks


@dataclass(frozen=True)
class ExactBlock:
    """One quantized block: element codes, scale code, MX+ index and MX++ exponent difference, float32 values."""

    codes: list[int]
    scale: int
    index: int
    delta: int
    values: list[float]


def to_float32(value: Fraction, negative: bool) -> float:
    """One rounding to float32 of a number with at most 53 significant bits; past the largest it is Inf."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(float(value)))
    return -rounded if negative else rounded


def signed(block: list[float]) -> list[tuple[Fraction, bool]]:
    """Magnitudes and signs (the sign of -0 too)."""
    return [(abs(Fraction(v)), math.copysign(1.0, v) < 0) for v in block]


def quantize_block(block: list[float], fmt: BlockFormat, noise: list[int] | None = None) -> ExactBlock:
    """One block of finite floats under a power-of-two scale and a rule that looks at amax or a percentile."""
    assert fmt.scale.is_power_of_two and fmt.rule.kind is not RuleKind.PRESCALE
    numbers = signed(block)
    random = noise or [0] * len(block)
    exponent = rule_exponent([m for m, _ in numbers], fmt)
    stored = scale_code(exponent, fmt.scale)
    if fmt.extension is not Extension.NONE:
        return _extended_block(numbers, fmt, stored, random)
    factor = two_to(stored - fmt.scale.bias)
    codes = [
        encode(m / factor, neg, fmt.element, fmt.rounding, fmt.overflow, r)
        for (m, neg), r in zip(numbers, random, strict=True)
    ]
    return ExactBlock(codes, stored, 0, 0, [_value(fmt.element, code, factor) for code in codes])


def _value(element: Element, code: int, factor: Fraction) -> float:
    number = decode(element, code)
    if not math.isfinite(number):
        return number
    return to_float32(abs(Fraction(number)) * factor, math.copysign(1.0, number) < 0)


def _extended_block(
    numbers: list[tuple[Fraction, bool]], fmt: BlockFormat, stored: int, noise: list[int]
) -> ExactBlock:
    """MX+ and MX++ as arXiv 2510.14557 defines them, with index 0 and all zeros for scale code 0."""
    if stored == 0:
        return ExactBlock([0] * len(numbers), 0, 0, 0, [0.0] * len(numbers))
    element = fmt.element
    e_max = floor_log2(max_magnitude(element))
    shared = stored - fmt.scale.bias
    largest = max(m for m, _ in numbers)
    index = next(i for i, (m, _) in enumerate(numbers) if m == largest)
    delta = 0
    if fmt.extension is Extension.PLUSPLUS:
        others = max(m for i, (m, _) in enumerate(numbers) if i != index)
        wanted = floor_log2(others) - e_max + 1 if others else -(10**6)
        delta = max(0, min(shared - wanted, 7, stored))  # never below the scale's smallest exponent
    codes, values = [], []
    for i, (m, neg) in enumerate(numbers):
        if i == index:
            code = _largest_code(m / two_to(shared), neg, fmt, noise[i], e_max)
            fraction_bits = element.bits - 1
            fraction = Fraction(code % 2**fraction_bits, 2**fraction_bits)
            values.append(to_float32((1 + fraction) * two_to(e_max + shared), neg))
        else:
            factor = two_to(shared - delta)
            code = encode(m / factor, neg, element, fmt.rounding, Overflow.SATURATE, noise[i])
            values.append(_value(element, code, factor))
        codes.append(code)
    return ExactBlock(codes, stored, index, delta, values)


def _largest_code(scaled: Fraction, negative: bool, fmt: BlockFormat, noise: int, e_max: int) -> int:
    bits = fmt.element.bits - 1
    steps = (scaled / two_to(e_max) - 1) * 2**bits
    whole = math.floor(steps)
    whole += rounds_up(steps - whole, whole, fmt.rounding, noise)
    return max(0, min(2**bits - 1, whole)) | negative << bits


# ----------------------------------------------------------------------- formats with a float scale, in float32


def f32_inverse_scale(amax: float, numerator: float) -> np.float32:
    """(1 / amax) * numerator as a finite float32, each step rounded; 1 for amax 0."""
    if amax == 0:
        return np.float32(1)
    with np.errstate(over="ignore"):
        ratio = np.float32(1) / np.float32(amax) * np.float32(numerator)
    return min(ratio, np.float32(float(FLOAT32_MAX)))


def random_bits(index: int, seed: int, step: int = 0, place: int = 0) -> int:
    """The 24 random bits of an element, in plain integers."""
    mask = 2**32 - 1

    def mix(h: int) -> int:
        h = (h ^ ((h >> 32) * 0x85EBCA6B)) & mask
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
            h ^= h >> shift
            h = (h * factor) & mask
        return h

    key = mix(seed + 0x9E3779B9)
    if (step, place) != (0, 0):
        key = mix(mix(key ^ mix(step + 0x85EBCA6B)) ^ mix(place + 0xC2B2AE35))
    return mix(mix(index) ^ key) >> 8


def f32_product(number: float, factor: np.float32) -> float:
    """One float32 multiplication; past the largest it is Inf."""
    with np.errstate(over="ignore"):
        return float(np.float32(number) * factor)


def quantize_float_scale_block(
    block: list[float], fmt: BlockFormat, inv_scale: np.float32 | None, plain_codes: int = 2
) -> ExactBlock:
    """One block under rule ``amax``, every step rounded to float32 as the contract says; plain or plus."""
    assert fmt.rule.kind is RuleKind.AMAX and fmt.scale.bits <= 8
    numbers = signed(block)
    element = fmt.element
    top = np.float32(float(max_magnitude(element)))
    raw = np.float32(float(max(m for m, _ in numbers))) / top
    wanted = raw if inv_scale is None else raw * inv_scale
    stored = encode(Fraction(float(wanted)), False, fmt.scale)
    factor = np.float32(decode(fmt.scale, stored))
    if inv_scale is not None:
        factor = factor / inv_scale
    codes, values = [], []
    scaled = [Fraction(float(np.float32(float(m)) / factor)) if factor > 0 else Fraction(0) for m, _ in numbers]
    for value, (_, neg) in zip(scaled, numbers, strict=True):
        codes.append(encode(value, neg and bool(factor > 0), element, fmt.rounding))
        values.append(f32_product(decode(element, codes[-1]), factor))
    index = 0
    if fmt.extension is Extension.PLUS and stored > plain_codes:
        e_max, bits = floor_log2(max_magnitude(element)), element.bits - 1
        largest = max(m for m, _ in numbers)
        index = next(i for i, (m, _) in enumerate(numbers) if m == largest)
        code = _largest_code(scaled[index], numbers[index][1], fmt, 0, e_max)
        number = float((1 + Fraction(code % 2**bits, 2**bits)) * two_to(e_max))
        codes[index] = code
        values[index] = f32_product(-number if numbers[index][1] else number, factor)
    return ExactBlock(codes, stored, index, 0, values)
