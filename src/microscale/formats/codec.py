"""Encode and decode single numbers: float32 to element codes and back, in vectorised torch.

This is the definition of every rounding mode. All arithmetic is exact: a float is rounded on its bit pattern
(add, then shift), a subnormal or an integer after a multiplication by a power of two. Blocks and scales are the
business of ``kernels``.

Stochastic rounding draws 24 bits for each element from a counter-based generator (:func:`random_bits`), so that
a number depends on the draw and on the element's place only, on every device.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

from microscale.errors import ArgumentError, DtypeError, FormatError, ShapeError, check_kind, shown
from microscale.formats.block import BlockFormat, ZeroPoint
from microscale.formats.draw import Draw, mix
from microscale.formats.elements import E4M3, FP16, FP32, Element, FloatElement, IntElement
from microscale.formats.policies import Overflow, Rounding

RANDOM_BITS = 24
TABLE_BITS = 16
"""Widest element whose values are kept as a table."""


def random_bits(indices: Integer[Tensor, "..."], draw: Draw) -> Integer[Tensor, "..."]:
    """Return 24 pseudo-random bits for each index, the same on every device and in every order.

    Formula: mix(mix(index) ^ key), the top 24 of its 32 bits, with :func:`~microscale.formats.draw.mix` and the key of
    the draw (:attr:`~microscale.formats.draw.Draw.key`).

    Raises:
        DtypeError: indices that are no tensor of integers.
        ArgumentError: no draw.
    """
    check_kind(draw, Draw, "the draw", "a Draw(seed=, step=, place=)")
    _check_integers(indices, "the indices of random bits")
    return mix(mix(indices.to(torch.int64)) ^ draw.key) >> (32 - RANDOM_BITS)


def round_to_int(
    values: Float[Tensor, "..."], rounding: Rounding, noise: Integer[Tensor, "..."] | None = None
) -> Float[Tensor, "..."]:
    """Round float32 numbers to whole numbers (still float32).

    Special values: -0 stays -0; ties by the mode; NaN and Inf pass through.
    ``noise`` holds the 24 random bits of each element and is needed for stochastic rounding only.

    Raises:
        ArgumentError: no rounding mode.
        DtypeError, ShapeError: numbers that are no float32 tensor; noise that is needed and missing, no integers, or
            not one for each number.
    """
    _check_numbers(values)
    _check_rounding(rounding, noise, values)
    match rounding:
        case Rounding.NEAREST_EVEN:
            return torch.round(values)
        case Rounding.TOWARD_ZERO:
            return torch.trunc(values)
        case Rounding.NEAREST_AWAY:
            whole = torch.trunc(values)
            step = torch.copysign(torch.ones_like(values), values)
            return torch.where((values - whole).abs() >= 0.5, whole + step, whole)
        case Rounding.STOCHASTIC:
            assert noise is not None
            whole = torch.trunc(values)
            step = torch.copysign(torch.ones_like(values), values)
            threshold = noise.to(torch.float32) * 2.0**-RANDOM_BITS
            return torch.where((values - whole).abs() > threshold, whole + step, whole)


def encode(
    values: Float[Tensor, "..."],
    element: Element,
    *,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    noise: Integer[Tensor, "..."] | None = None,
) -> Integer[Tensor, "..."]:
    """Round float32 numbers to codes (uint8 for elements of up to 8 bits, else int32).

    Special values: -0 keeps its sign in signed floats and is 0 elsewhere; an unsigned element takes any negative
    number as 0 (as its smallest value where it has no zero); NaN gets the element's NaN code,
    or code 0 where it has none; Inf and overflow follow ``overflow``; results below the smallest value are
    rounded like all others (gradual underflow).

    Raises:
        ArgumentError: no element, no rounding mode or overflow policy.
        DtypeError, ShapeError: numbers that are no float32 tensor; noise that is needed and missing, no integers, or
            not one for each number.
    """
    _check_numbers(values)
    _check_element(element)
    _check_rounding(rounding, noise, values)
    check_kind(overflow, Overflow, "the overflow policy", "an Overflow")
    if isinstance(element, IntElement):
        codes = _encode_int(values, element, rounding, noise)
    else:
        codes = _encode_float(values, element, rounding, overflow, noise)
    return codes.to(torch.uint8) if element.bits <= 8 else codes


def _check_numbers(values: object) -> None:
    if not isinstance(values, Tensor) or values.dtype != torch.float32:
        found = f"a {values.dtype} tensor" if isinstance(values, Tensor) else shown(values)
        raise DtypeError(f"the numbers to be encoded must be a float32 tensor, got {found}; cast them first")


def _check_element(element: object) -> None:
    check_kind(element, (FloatElement, IntElement), "the element", "a FloatElement or IntElement")


def _check_rounding(rounding: object, noise: object, values: Tensor) -> None:
    check_kind(rounding, Rounding, "the rounding", "a Rounding")
    if rounding is not Rounding.STOCHASTIC and noise is None:
        return
    _check_integers(noise, "the noise of stochastic rounding (random_bits of each element)")
    if isinstance(noise, Tensor) and noise.shape != values.shape:
        raise ShapeError(f"the noise of each element has the shape {list(values.shape)}, got {list(noise.shape)}")


def _check_integers(codes: object, name: str) -> None:
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(codes, Tensor) or codes.dtype not in kinds:
        found = f"a {codes.dtype} tensor" if isinstance(codes, Tensor) else shown(codes)
        raise DtypeError(f"{name} must be a tensor of integers, got {found}")


def _encode_int(
    values: Tensor, element: IntElement, rounding: Rounding, noise: Tensor | None
) -> Integer[Tensor, "..."]:
    scaled = values * 2.0**element.fraction_bits if element.fraction_bits else values
    whole = round_to_int(scaled, rounding, noise).nan_to_num(0.0, element.max_code, element.min_code)
    whole = whole.clamp(element.min_code, element.max_code)
    return whole.to(torch.int32) & (2**element.bits - 1)


def _encode_float(
    values: Tensor, element: FloatElement, rounding: Rounding, overflow: Overflow, noise: Tensor | None
) -> Integer[Tensor, "..."]:
    if not element.signed:
        values = torch.where(values < 0, 0.0, values)
    if rounding is Rounding.NEAREST_EVEN and overflow is Overflow.SATURATE and _has_anchor(element):
        return _encode_by_anchor(values, element)
    bits = values.contiguous().view(torch.int32)
    magnitude_bits = bits & 0x7FFFFFFF
    magnitude = magnitude_bits.view(torch.float32)
    codes = _round_normal(_normal_bits(magnitude_bits, element), element, rounding, noise)
    if element.subnormals:
        small = _round_subnormal(magnitude, element, rounding, noise)
        codes = torch.where(magnitude < element.min_normal, small, codes)
    codes = codes.clamp(min=0)
    if overflow is Overflow.SATURATE:
        codes = codes.clamp(max=element.max_code)
    else:
        special = element.inf_code if element.inf_code is not None else element.nan_code
        assert special is not None
        codes = torch.where(codes > element.max_code, special, codes)
    codes = torch.where(magnitude_bits > 0x7F800000, element.nan_code or 0, codes)
    if element.signed:
        sign_bit = 1 << (element.exponent_bits + element.mantissa_bits)
        codes = torch.where(bits < 0, codes | sign_bit, codes)
    else:
        codes = torch.where(values < 0, 0, codes)
    return codes


def _normal_bits(magnitude_bits: Tensor, element: FloatElement) -> Integer[Tensor, "..."]:
    """Give float32 subnormals a leading one and an exponent field below zero, where the element has such normals."""
    if element.min_normal >= torch.finfo(torch.float32).tiny:
        return magnitude_bits
    scaled_bits = (magnitude_bits.view(torch.float32) * 2.0**64).view(torch.int32) - (64 << 23)
    return torch.where(magnitude_bits < 1 << 23, scaled_bits, magnitude_bits)


def _has_anchor(element: FloatElement) -> bool:
    """Whether 2^(e + 23 - M) is a normal float32 for every exponent e of the element, so that adding it rounds.

    It must also be larger than the number it is added to (so not for fp32); unsigned elements are left out.
    """
    lowest, highest = 1 - element.bias, element.max_exponent + 23 - element.mantissa_bits
    has_room = 1 <= element.mantissa_bits < 23 and lowest >= -126 and highest <= 127
    return element.signed and element.subnormals and has_room


def _encode_by_anchor(values: Tensor, element: FloatElement) -> Integer[Tensor, "..."]:
    """Nearest-even with saturation in few passes: |x| + 2^(e + 23 - M) is rounded by the float32 addition itself.

    The sum's last bits then count steps of 2^(e - M), e being the exponent of |x|, or the subnormals' for small x.
    """
    bits = values.contiguous().view(torch.int32)
    magnitude = values.abs().clamp_(max=element.max_value)
    lowest_field = 128 - element.bias
    field = (magnitude.view(torch.int32) >> 23).clamp_(min=lowest_field)
    anchor = (field + (23 - element.mantissa_bits)).bitwise_left_shift_(23)
    codes = (magnitude + anchor.view(torch.float32)).view(torch.int32).sub_(anchor)
    codes += field.sub_(lowest_field).bitwise_left_shift_(element.mantissa_bits)
    codes = torch.where(torch.isnan(values), element.nan_code or 0, codes)
    sign_bit = 1 << (element.exponent_bits + element.mantissa_bits)
    return codes.bitwise_or_((bits >> 31).bitwise_and_(sign_bit))


def _round_normal(
    magnitude_bits: Tensor, element: FloatElement, rounding: Rounding, noise: Tensor | None
) -> Integer[Tensor, "..."]:
    """Round the bit pattern at the element's last mantissa bit; a carry moves into the exponent as it should."""
    shift = 23 - element.mantissa_bits
    rebias = (127 - element.bias) << element.mantissa_bits
    if not shift:
        return magnitude_bits - rebias
    match rounding:
        case Rounding.NEAREST_EVEN:
            rounded = magnitude_bits + (((magnitude_bits >> shift) & 1) + ((1 << (shift - 1)) - 1))
        case Rounding.NEAREST_AWAY:
            rounded = magnitude_bits + (1 << (shift - 1))
        case Rounding.TOWARD_ZERO:
            rounded = magnitude_bits
        case Rounding.STOCHASTIC:
            assert noise is not None
            dropped = magnitude_bits & ((1 << shift) - 1)
            up = dropped > (noise >> (RANDOM_BITS - shift))
            rounded = magnitude_bits + (up.to(torch.int32) << shift)
    # 0x7F800000 + rounding cannot wrap: the largest pattern plus half a step stays below 2^31.
    return (rounded >> shift) - rebias


def _round_subnormal(
    magnitude: Tensor, element: FloatElement, rounding: Rounding, noise: Tensor | None
) -> Integer[Tensor, "..."]:
    """Count whole steps of the smallest value; 2^M steps are the smallest normal code, as the encoding has it."""
    steps_log2 = -element.min_exponent
    if steps_log2 <= 127:
        steps = magnitude * 2.0**steps_log2
    else:
        steps = (magnitude * 2.0**64) * 2.0 ** (steps_log2 - 64)
    steps = steps.clamp(max=2.0 ** (element.mantissa_bits + 1)).nan_to_num(0.0)
    return round_to_int(steps, rounding, noise).to(torch.int32)


@functools.lru_cache(maxsize=256)
def _value_table(element: Element, device: torch.device) -> Float[Tensor, "codes"]:
    return torch.tensor([element.value(code) for code in range(2**element.bits)], dtype=torch.float32, device=device)


def value_table(element: Element, device: torch.device | str = "cpu") -> Float[Tensor, "codes"]:
    """Return the float32 value of every code of an element of up to 16 bits, on ``device``.

    Raises:
        ArgumentError: no element, or a wider one; no device.
    """
    _check_element(element)
    if element.bits > TABLE_BITS:
        raise ArgumentError(f"a table of values is for elements of up to {TABLE_BITS} bits, got {element.name}")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        raise ArgumentError(f"a device must be one of torch's, such as 'cpu', got {shown(device)}") from None
    return _value_table(element, place)


def decode(codes: Integer[Tensor, "..."], element: Element) -> Float[Tensor, "..."]:
    """Return the float32 values of codes; exact, NaN and Inf codes included.

    Raises:
        DtypeError: codes that are no tensor of integers.
        FormatError: a code that the element does not have.
        ArgumentError: no element.
    """
    _check_element(element)
    check_kind(codes, Tensor, f"codes of {element.name}", "a tensor of integers", error=DtypeError)
    if element == FP32 and codes.dtype in (torch.int32, torch.float32):
        return codes.view(torch.float32)
    _check_integers(codes, f"codes of {element.name}")
    is_narrow = codes.dtype == torch.uint8 and element.bits >= 8
    if not is_narrow and codes.numel() and not codes.is_meta:
        low, high = (int(edge) for edge in torch.aminmax(codes))
        if low < 0 or high >= 2**element.bits:
            raise FormatError(
                f"codes of {element.name} are 0 to {2**element.bits - 1}, got {low} to {high}; unpack them by its width"
            )
    return decode_known(codes, element)


def decode_known(codes: Integer[Tensor, "..."], element: Element) -> Float[Tensor, "..."]:
    """Return what :func:`decode` returns, for codes that are known to be the element's: they are not looked at."""
    if element == FP32 and codes.dtype in (torch.int32, torch.float32):
        return codes.view(torch.float32)
    table = value_table(element, codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def encode_scale(
    raw: Float[Tensor, "..."], scale: FloatElement, *, rounding: Rounding = Rounding.NEAREST_EVEN
) -> Shaped[Tensor, "..."]:
    """Store positive float32 scales: uint8 codes, or a float16, bfloat16 or float32 tensor for the wide ones.

    Saturates; NaN gives the NaN code. ``TOWARD_ZERO`` is not meant here; ``rceil`` uses :func:`encode_scale_up`.

    Raises:
        DtypeError, ArgumentError: see :func:`encode`; a scale that is no FloatElement.
    """
    _check_scale(scale)
    codes = encode(raw, scale, rounding=rounding)
    return _store_scale(codes, scale)


def encode_scale_up(raw: Float[Tensor, "..."], scale: FloatElement) -> Shaped[Tensor, "..."]:
    """Store the smallest scale value that is not below ``raw`` (saturating at the largest).

    Raises:
        DtypeError, ArgumentError: see :func:`encode_scale`.
    """
    _check_scale(scale)
    codes = encode(raw, scale, rounding=Rounding.TOWARD_ZERO).to(torch.int32)
    below = decode(codes, scale) < raw
    codes = torch.where(below, (codes + 1).clamp(max=scale.max_code), codes)
    return _store_scale(codes, scale)


def _check_scale(scale: object) -> None:
    check_kind(scale, FloatElement, "the scale", "a FloatElement")


def _store_scale(codes: Tensor, scale: FloatElement) -> Shaped[Tensor, "..."]:
    if scale.bits <= 8:
        return codes.to(torch.uint8)
    if scale == FP32:
        return codes.to(torch.int32).view(torch.float32)
    return codes.to(torch.int16).view(torch.float16 if scale == FP16 else torch.bfloat16)


def decode_scale(stored: Shaped[Tensor, "..."], scale: FloatElement) -> Float[Tensor, "..."]:
    """Return the float32 value of stored scales; exact.

    Raises:
        DtypeError, FormatError: see :func:`decode`; a wide scale that is no float tensor.
        ArgumentError: a scale that is no FloatElement.
    """
    _check_scale(scale)
    if scale.bits <= 8:
        return decode(stored, scale)
    check_kind(stored, Tensor, f"stored scales in {scale.name}", "a float tensor", error=DtypeError)
    if not stored.is_floating_point():
        raise DtypeError(f"stored scales in {scale.name} must be a float tensor, got {stored.dtype}")
    return stored.to(torch.float32)


PLAIN_SCALE_CODES = 2
"""MX+ over a float scale: blocks whose scale code is at most this keep the plain encoding (arXiv 2510.14557 §8.3)."""


def is_plain_block(stored: Shaped[Tensor, "..."], scale: FloatElement) -> Bool[Tensor, "..."]:
    """Whether a block of MX+ over a float scale keeps the plain encoding: its scale code is too small."""
    return decode_scale(stored, scale) <= scale.value(PLAIN_SCALE_CODES)


def has_largest(stored: Shaped[Tensor, "..."], fmt: BlockFormat) -> Bool[Tensor, "..."]:
    """Whether blocks of MX+ and MX++ with these scale codes have a largest element apart.

    Special values: not where scale code 0 says that the block is zero, nor where a float scale is too small; where the
    scale is NaN, yes.
    """
    return stored != 0 if fmt.has_zero_code else ~is_plain_block(stored, fmt.scale)


def decode_zero_point(stored: Shaped[Tensor, "..."], fmt: BlockFormat) -> Float[Tensor, "..."]:
    """Return stored zero points as float32."""
    if fmt.zero_point is ZeroPoint.INT:
        return stored.to(torch.float32)
    return decode_scale(stored, zero_point_element(fmt))


def zero_point_element(fmt: BlockFormat) -> FloatElement:
    """Return the float type of a stored fp8 or fp16 zero point."""
    return E4M3 if fmt.zero_point is ZeroPoint.FP8 else FP16
