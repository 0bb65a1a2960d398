"""Element records: what one code means.

A :class:`FloatElement` is any (sign, exponent, mantissa) float with a bias and a convention for special
values; an :class:`IntElement` is a two's-complement or unsigned integer with an implied binary fraction.
Scales are made of the same records: ``e8m0`` is an unsigned float without mantissa, zero or subnormals.

The value of a float code with exponent field ``e`` and mantissa field ``m`` is

    (-1)^s * 2^(e - bias) * (1 + m / 2^M)      for e > 0 (or where the element has no subnormals),
    (-1)^s * 2^(1 - bias) * m / 2^M            for e = 0,

and of an integer code ``q / 2^fraction_bits``. Every finite value must be a float32.

Sources: OCP MX v1.0 sections 5.3 and 5.4; OCP OFP8 v1.0 for E4M3 and E5M2; IEEE 754 for fp16; the E3M4
conventions of ml_dtypes (``float8_e3m4``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from microscale.errors import FormatError, check_kind
from microscale.formats.fields import check_fields

FLOAT32_MAX_EXPONENT = 127
FLOAT32_MIN_EXPONENT = -149
MAX_EXPONENT_BITS = 8
MAX_MANTISSA_BITS = 10


class SpecialValues(Enum):
    """Which codes are not finite numbers."""

    IEEE = "ieee"
    """The top exponent field holds Inf (mantissa 0) and NaN (all others)."""
    FN = "fn"
    """No Inf; the code with all exponent and mantissa bits set is NaN."""
    NONE = "none"
    """Every code is a finite number."""


def _check_widths(exponent_bits: int, mantissa_bits: int) -> None:
    for name, value in (("exponent", exponent_bits), ("mantissa", mantissa_bits)):
        check_kind(value, int, f"the number of {name} bits", "a whole number", error=FormatError)
    if not 0 <= exponent_bits <= MAX_EXPONENT_BITS:
        raise FormatError(f"a float element has 0 to {MAX_EXPONENT_BITS} exponent bits, got {exponent_bits}")
    if not (0 <= mantissa_bits <= MAX_MANTISSA_BITS or (exponent_bits, mantissa_bits) == (8, 23)):
        raise FormatError(f"a float element has 0 to {MAX_MANTISSA_BITS} mantissa bits, got {mantissa_bits}")


def default_bias(exponent_bits: int) -> int:
    """Return 2^(E-1) - 1, and 0 for E = 0 (then the step is 2^(1-M), as an integer with b - 2 fraction bits)."""
    return 2 ** (exponent_bits - 1) - 1 if exponent_bits else 0


def default_specials(exponent_bits: int, mantissa_bits: int) -> SpecialValues:
    """Return the convention that the plain word ``eXmY`` stands for.

    ``e4m3`` is OCP's (fn); other elements of 8 bits or more with E >= 3 and a mantissa are IEEE-like
    (``e5m2``, ``e3m4``, fp16, bf16); all narrower ones have no special values (OCP FP4 and FP6).
    """
    if (exponent_bits, mantissa_bits) == (4, 3):
        return SpecialValues.FN
    if 1 + exponent_bits + mantissa_bits >= 8 and exponent_bits >= 3 and mantissa_bits >= 1:
        return SpecialValues.IEEE
    return SpecialValues.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatElement:
    """A float with ``exponent_bits`` (0-8), ``mantissa_bits`` (0-10; 23 only for fp32), any bias, any specials.

    Raises:
        FormatError: a field out of range, specials that leave no finite code, or values outside float32.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: SpecialValues
    signed: bool = True
    subnormals: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        e, m = self.exponent_bits, self.mantissa_bits
        _check_widths(e, m)
        if e + m == 0:
            raise FormatError("a float element needs at least one exponent or mantissa bit, got e0m0")
        if self.specials is SpecialValues.IEEE and (m == 0 or e < 2):
            raise FormatError(f"IEEE-like special values need E >= 2 and M >= 1, got e{e}m{m}; use 'none' or 'fn'")
        if not self.subnormals and m != 0:
            raise FormatError(f"only pure powers of two (M = 0) come without zero and subnormals, got M = {m}")
        if not self.subnormals and (self.signed or self.specials is not SpecialValues.FN):
            raise FormatError("a pure power of two is unsigned and its top code is NaN (specials 'fn')")
        if self.subnormals and self.max_code == 0:
            raise FormatError(f"e{e}m{m} with specials 'fn' has no finite number but 0; give it another bit")
        if self.max_exponent > FLOAT32_MAX_EXPONENT or self.min_exponent < FLOAT32_MIN_EXPONENT:
            raise FormatError(
                f"every value of an element must be a float32 (2^{FLOAT32_MIN_EXPONENT} to below 2^128),"
                f" but e{e}m{m} with bias {self.bias} reaches from 2^{self.min_exponent} to 2^{self.max_exponent};"
                " choose another bias"
            )

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def bits_stored(self) -> int:
        """Width of a code as a scale in memory: 8, 16 or 32 bits."""
        return 8 if self.bits <= 8 else 16 if self.bits <= 16 else 32

    @property
    def max_code(self) -> int:
        """Code of the largest finite value (without the sign bit)."""
        top = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        if self.specials is SpecialValues.FN:
            return top - 1
        if self.specials is SpecialValues.IEEE:
            return top - 2**self.mantissa_bits
        return top

    @property
    def nan_code(self) -> int | None:
        """The code we write for NaN (positive, quiet), or None where the element has no NaN."""
        top = 2 ** (self.exponent_bits + self.mantissa_bits) - 1
        if self.specials is SpecialValues.FN:
            return top
        if self.specials is SpecialValues.IEEE:
            return top - 2 ** (self.mantissa_bits - 1) + 1 if self.mantissa_bits > 1 else top
        return None

    @property
    def inf_code(self) -> int | None:
        """The code of +Inf, or None where the element has no infinity."""
        return self.max_code + 1 if self.specials is SpecialValues.IEEE else None

    @property
    def max_value(self) -> float:
        """Largest finite value."""
        return self.value(self.max_code)

    @property
    def min_value(self) -> float:
        """Smallest positive value."""
        return self.value(1 if self.subnormals else 0)

    @property
    def min_normal(self) -> float:
        """Smallest value with an implicit leading one (2^(1 - bias))."""
        return 2.0 ** (1 - self.bias) if self.subnormals else self.value(0)

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_value)): e_max of the OCP scale rule."""
        field, mantissa = divmod(self.max_code, 2**self.mantissa_bits)
        if field == 0 and self.subnormals:
            return 1 - self.bias - self.mantissa_bits + mantissa.bit_length() - 1
        return field - self.bias

    @property
    def min_exponent(self) -> int:
        """log2(min_value)."""
        return 1 - self.bias - self.mantissa_bits if self.subnormals else -self.bias

    @property
    def is_power_of_two(self) -> bool:
        """Whether every finite value is a power of two (true of ``e8m0`` and its narrower kin)."""
        return not self.subnormals

    def value(self, code: int) -> float:
        """Return the number that ``code`` stands for (NaN, Inf and -0 included)."""
        magnitude_bits = self.exponent_bits + self.mantissa_bits
        sign = -1.0 if self.signed and code >> magnitude_bits & 1 else 1.0
        magnitude = code & (2**magnitude_bits - 1)
        if magnitude > self.max_code:
            return sign * math.inf if magnitude == self.inf_code else math.nan
        field, mantissa = divmod(magnitude, 2**self.mantissa_bits)
        if field == 0 and self.subnormals:
            return sign * math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return sign * math.ldexp(2**self.mantissa_bits + mantissa, field - self.bias - self.mantissa_bits)

    @property
    def name(self) -> str:
        """Canonical word, e.g. ``e2m1``, ``fp16``, ``e4m3-ieee``, ``e3m2-b5``, ``ue5m3``."""
        for word, element in _NAMED_WIDE.items():
            if element == self:
                return word
        e, m = self.exponent_bits, self.mantissa_bits
        word = f"{'' if self.signed or not self.subnormals else 'u'}e{e}m{m}"
        expected = SpecialValues.FN if not self.subnormals else default_specials(e, m)
        if self.specials is not expected:
            word += f"-{self.specials.value}"
        if self.bias != default_bias(e):
            word += f"-b{self.bias}"
        return word


@dataclass(frozen=True, slots=True, kw_only=True)
class IntElement:
    """An integer of 2 to 8 bits that stands for ``q / 2^fraction_bits``.

    ``symmetric`` keeps the most negative two's-complement code unused when encoding (OCP MX v1.0 section 5.3.4
    allows it for INT8); decoding still reads it as ``-2^(bits-1) / 2^fraction_bits``.

    Raises:
        FormatError: a field out of range, or an unsigned element that asks for symmetry.
    """

    bits: int
    fraction_bits: int
    signed: bool = True
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not 2 <= self.bits <= 8:
            raise FormatError(f"an integer element has 2 to 8 bits, got {self.bits}")
        if not -64 <= self.fraction_bits <= 64:
            raise FormatError(f"an integer element has -64 to 64 fraction bits, got {self.fraction_bits}")
        if not self.signed and self.symmetric:
            raise FormatError("an unsigned integer cannot be symmetric")

    @property
    def max_code(self) -> int:
        """Largest integer."""
        return 2 ** (self.bits - int(self.signed)) - 1

    @property
    def min_code(self) -> int:
        """Smallest integer that encoding writes."""
        if not self.signed:
            return 0
        return -self.max_code - (0 if self.symmetric else 1)

    @property
    def max_value(self) -> float:
        """Largest value."""
        return math.ldexp(self.max_code, -self.fraction_bits)

    @property
    def min_value(self) -> float:
        """Smallest positive value (one step)."""
        return math.ldexp(1, -self.fraction_bits)

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_value)): e_max of the OCP scale rule."""
        return self.max_code.bit_length() - 1 - self.fraction_bits

    @property
    def mantissa_bits(self) -> int:
        """Fraction bits below the leading bit of the largest value (what rule ``even`` rounds to)."""
        return self.max_code.bit_length() - 1

    def value(self, code: int) -> float:
        """Return the number that the unsigned bit pattern ``code`` stands for."""
        if self.signed and code >> (self.bits - 1) & 1:
            code -= 2**self.bits
        return math.ldexp(code, -self.fraction_bits)

    @property
    def name(self) -> str:
        """Canonical word, e.g. ``int8``, ``uint4``, ``int4-f0``, ``int4-full``."""
        word = f"{'' if self.signed else 'u'}int{self.bits}"
        if self.fraction_bits != (self.bits - 2 if self.signed else 0):
            word += f"-f{self.fraction_bits}"
        if self.signed and not self.symmetric:
            word += "-full"
        return word


Element = FloatElement | IntElement


def float_element(
    exponent_bits: int,
    mantissa_bits: int,
    *,
    bias: int | None = None,
    specials: SpecialValues | None = None,
    signed: bool = True,
) -> FloatElement:
    """Build ``eXmY`` with the default bias and specials where none are given.

    Raises:
        FormatError: see :class:`FloatElement`.
    """
    _check_widths(exponent_bits, mantissa_bits)
    return FloatElement(
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=default_bias(exponent_bits) if bias is None else bias,
        specials=default_specials(exponent_bits, mantissa_bits) if specials is None else specials,
        signed=signed,
    )


def power_of_two_scale(exponent_bits: int, *, bias: int | None = None) -> FloatElement:
    """Build the scale ``eXm0``: 2^(code - bias), the top code is NaN, no zero (OCP MX v1.0 section 5.4.1)."""
    _check_widths(exponent_bits, 0)
    return FloatElement(
        exponent_bits=exponent_bits,
        mantissa_bits=0,
        bias=default_bias(exponent_bits) if bias is None else bias,
        specials=SpecialValues.FN,
        signed=False,
        subnormals=False,
    )


def int_element(bits: int, *, fraction_bits: int | None = None, symmetric: bool = True) -> IntElement:
    """Build the signed ``intN``, by default with OCP's implied fraction of N - 2 bits (range about -2 to 2)."""
    check_kind(bits, int, "the width of an integer element", "a whole number", error=FormatError)
    fraction = bits - 2 if fraction_bits is None else fraction_bits
    return IntElement(bits=bits, fraction_bits=fraction, symmetric=symmetric)


def uint_element(bits: int, *, fraction_bits: int = 0) -> IntElement:
    """Build the unsigned ``uintN`` that formats with a zero point use."""
    return IntElement(bits=bits, fraction_bits=fraction_bits, signed=False, symmetric=False)


E2M1 = float_element(2, 1)
E2M3 = float_element(2, 3)
E3M2 = float_element(3, 2)
E4M3 = float_element(4, 3)
E5M2 = float_element(5, 2)
E3M4 = float_element(3, 4)
E0M3 = float_element(0, 3)
E1M2 = float_element(1, 2)
FP16 = float_element(5, 10)
BF16 = float_element(8, 7)
FP32 = FloatElement(exponent_bits=8, mantissa_bits=23, bias=127, specials=SpecialValues.IEEE)
E8M0 = power_of_two_scale(8)

_NAMED_WIDE = {"fp16": FP16, "bf16": BF16, "fp32": FP32}

NAMED_ELEMENTS: dict[str, Element] = {
    "e2m1": E2M1,
    "e2m3": E2M3,
    "e3m2": E3M2,
    "e4m3": E4M3,
    "e5m2": E5M2,
    "e3m4": E3M4,
    "e0m3": E0M3,
    "e1m2": E1M2,
    **{f"int{bits}": int_element(bits) for bits in range(2, 9)},
    "fp16": FP16,
    "bf16": BF16,
}
"""The elements that ``microscale formats`` lists by name; the grammar builds any other."""
