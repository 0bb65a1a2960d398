"""Scale rules in torch: from a block's numbers to its stored scale and the float32 factor it stands for.

Every power-of-two rule works on the exact exponent and mantissa of amax (frexp), never on a rounded logarithm or
quotient, so that subnormals and the largest floats are right to the bit. Sums (``std``, ``mse``) are taken in
float64 and in the one order of :func:`ordered_sum`, so that every backend and device gets the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from microscale.formats import BlockFormat, IntElement, RuleKind, ZeroPoint
from microscale.formats.codec import (
    decode,
    decode_scale,
    decode_zero_point,
    encode,
    encode_scale,
    encode_scale_up,
    zero_point_element,
)
from microscale.formats.rules import mse_factors

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Scales of all blocks of a matrix.

    ``stored`` is what a checkpoint holds; ``factor`` the float32 number that multiplies decoded codes (0 for a
    block that is all zeros under the format); ``tensor_inv`` the second level, where there is one.
    """

    stored: Shaped[Tensor, "grid_rows grid_cols"]
    factor: Float[Tensor, "grid_rows grid_cols"]
    tensor_inv: Float[Tensor, "1"] | None


def floor_log2(values: Float[Tensor, "..."]) -> Integer[Tensor, "..."]:
    """Return floor(log2 |x|) exactly, subnormals included; a large negative number for 0."""
    _, exponent = torch.frexp(values)
    return torch.where(values == 0, -(2**20), exponent.to(torch.int32) - 1)


def scale_factor(
    stored: Shaped[Tensor, "..."], fmt: BlockFormat, tensor_inv: Float[Tensor, "1"] | None
) -> Float[Tensor, "..."]:
    """Return the float32 factor that stored scales stand for: decode(scale) * rule multiplier / tensor_inv_scale.

    It is at most the largest float32 (a factor of Inf would turn zeros into NaN), or NaN for a NaN scale.
    """
    factor = decode_scale(stored, fmt.scale)
    if fmt.rule.multiplier != 1.0:
        factor = (factor * fmt.rule.multiplier).clamp(max=FLOAT32_MAX)
    return (factor / tensor_inv).clamp(max=FLOAT32_MAX) if tensor_inv is not None else factor


def ordered_sum(values: Float[Tensor, "... size"]) -> Float[Tensor, "..."]:
    """Sum over the last axis by halves: the order of additions, and so the result, is the same on every device.

    Zeros are appended up to a power of two; then, until one number is left, its second half is added to the first:
    x[i] + x[i + n / 2] for i < n / 2. Each addition is one rounded addition in the type of ``values``.

    Special values: no numbers at all sum to 0; NaN and Inf as addition has them.
    """
    size = values.shape[-1]
    width = 1 << (max(size, 1) - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, width - size))
    while width > 1:
        width //= 2
        values = values[..., :width] + values[..., width:]
    return values.squeeze(-1)


def block_scales(
    blocks: Float[Tensor, "grid_rows grid_cols size"], fmt: BlockFormat, amax: Float[Tensor, "..."] | None
) -> BlockScales:
    """Apply the format's rule to finite blocks.

    ``amax`` replaces the measured statistic at the coarsest level: of the tensor where the format has a second
    level, else of each block (broadcast to the grid).

    Special values: a zero block gets the smallest scale (code 0); a tensor of zeros gets tensor_inv_scale 1.
    """
    measured = blocks.abs().amax(-1)
    if fmt.scale.is_power_of_two:
        used = measured if amax is None else amax.to(measured).expand_as(measured)
        exponent = _power_of_two_exponent(blocks, used, fmt)
        return _from_exponent(exponent, fmt)
    tensor_inv = _tensor_inv_scale(blocks, measured, fmt, amax) if fmt.tensor_scale is not None else None
    used = measured if amax is None or tensor_inv is not None else amax.to(measured).expand_as(measured)
    if fmt.rule.kind is RuleKind.MSE:
        return _least_squares(blocks, used, fmt, tensor_inv)
    raw = _raw_scale(blocks, used, fmt)
    return _from_raw(raw, fmt, tensor_inv)


def _from_exponent(exponent: Tensor, fmt: BlockFormat) -> BlockScales:
    stored = (exponent + fmt.scale.bias).clamp(0, fmt.scale.max_code).to(torch.uint8)
    return BlockScales(stored, scale_factor(stored, fmt, None), None)


def _from_raw(raw: Tensor, fmt: BlockFormat, tensor_inv: Tensor | None) -> BlockScales:
    scaled = raw * tensor_inv if tensor_inv is not None else raw
    scaled = scaled.clamp(max=FLOAT32_MAX)
    round_up = fmt.rule.kind in (RuleKind.RCEIL, RuleKind.PERCENTILE)
    stored = encode_scale_up(scaled, fmt.scale) if round_up else encode_scale(scaled, fmt.scale)
    return BlockScales(stored, scale_factor(stored, fmt, tensor_inv), tensor_inv)


def _power_of_two_exponent(blocks: Tensor, amax: Tensor, fmt: BlockFormat) -> Integer[Tensor, "grid_rows grid_cols"]:
    element, rule = fmt.element, fmt.rule
    match rule.kind:
        case RuleKind.FLOOR | RuleKind.PRESCALE:
            return floor_log2(amax) - element.max_exponent
        case RuleKind.CEIL:
            is_power = torch.frexp(amax)[0] == 0.5
            return floor_log2(amax) + (~is_power).to(torch.int32) - element.max_exponent
        case RuleKind.EVEN:
            mantissa_bits = rule.arguments[0] if rule.arguments else element.mantissa_bits
            rounds_up = torch.frexp(amax)[0] >= 1 - 2.0 ** -(mantissa_bits + 2)
            return floor_log2(amax) + rounds_up.to(torch.int32) - element.max_exponent
        case RuleKind.RCEIL:
            return _ceil_log2_ratio(amax, element.max_value)
        case RuleKind.THRESHOLD:
            return _ceil_log2_ratio(amax, rule.arguments[0])
        case RuleKind.PERCENTILE:
            return _ceil_log2_ratio(_percentile(blocks, rule.arguments[0]), element.max_value)
        case RuleKind.STD:
            return floor_log2(_std(blocks) * (rule.arguments[0] / element.max_value))
        case _:
            return _search_exponent(blocks, amax, fmt)


def _ceil_log2_ratio(amax: Tensor, divisor: float) -> Integer[Tensor, "..."]:
    """Return the smallest e with amax <= divisor * 2^e, exactly."""
    mantissa, exponent = torch.frexp(amax)
    divisor_mantissa, divisor_exponent = math.frexp(divisor)
    up = mantissa.to(torch.float64) > divisor_mantissa
    result = exponent.to(torch.int32) - divisor_exponent + up.to(torch.int32)
    return torch.where(amax == 0, -(2**20), result)


def _std(blocks: Tensor) -> Float[Tensor, "grid_rows grid_cols"]:
    """Population standard deviation in float64: the mean, then the mean of the squared deviations, then the root."""
    wide = blocks.to(torch.float64)
    deviations = wide - quotient(ordered_sum(wide), wide.shape[-1]).unsqueeze(-1)
    return quotient(ordered_sum(deviations.square()), wide.shape[-1]).sqrt()


def _percentile(blocks: Tensor, percent: float) -> Float[Tensor, "grid_rows grid_cols"]:
    rank = max(1, math.ceil(Fraction(repr(percent)) * blocks.shape[-1] / 100))
    return blocks.abs().kthvalue(rank, dim=-1).values


def _squared_error(blocks: Tensor, factor: Tensor, fmt: BlockFormat) -> Float[Tensor, "grid_rows grid_cols"]:
    values = decode(encode(divide(blocks, factor), fmt.element), fmt.element)
    return ordered_sum((values * factor.unsqueeze(-1) - blocks).to(torch.float64).square())


def divide(blocks: Float[Tensor, "... size"], factor: Float[Tensor, "..."]) -> Float[Tensor, "... size"]:
    """Return blocks / factor in float32, and 0 where the factor is 0 (a block flushed to zero) or NaN."""
    factor = factor.unsqueeze(-1)
    usable = factor > 0
    return torch.where(usable, blocks / torch.where(usable, factor, 1.0), 0.0)


def quotient(values: Float[Tensor, "..."], divisor: float) -> Float[Tensor, "..."]:
    """Return values / divisor, correctly rounded on every device (CUDA multiplies by 1 / divisor for a scalar)."""
    return values / values.new_tensor(divisor).expand_as(values)


def _search_exponent(blocks: Tensor, amax: Tensor, fmt: BlockFormat) -> Integer[Tensor, "grid_rows grid_cols"]:
    start = floor_log2(amax) - fmt.element.max_exponent
    low, high = (int(argument) for argument in fmt.rule.arguments)
    best = start + low
    best_error = torch.full(best.shape, math.inf, dtype=torch.float64, device=blocks.device)
    for offset in range(low, high + 1):
        candidate = start + offset
        error = _squared_error(blocks, _from_exponent(candidate, fmt).factor, fmt)
        best = torch.where(error < best_error, candidate, best)
        best_error = torch.minimum(error, best_error)
    return best


def _raw_scale(blocks: Tensor, amax: Tensor, fmt: BlockFormat) -> Float[Tensor, "grid_rows grid_cols"]:
    match fmt.rule.kind:
        case RuleKind.THRESHOLD:
            return quotient(amax, fmt.rule.arguments[0])
        case RuleKind.STD:
            raw = (_std(blocks) * (fmt.rule.arguments[0] / fmt.element.max_value)).to(torch.float32)
            return raw.clamp(max=FLOAT32_MAX)  # the second level is derived from finite numbers only
        case RuleKind.PERCENTILE:
            return quotient(_percentile(blocks, fmt.rule.arguments[0]), fmt.element.max_value)
        case _:
            return quotient(amax, fmt.element.max_value)


def _tensor_inv_scale(blocks: Tensor, measured: Tensor, fmt: BlockFormat, amax: Tensor | None) -> Float[Tensor, "1"]:
    """Return g with which the largest block scale of the tensor becomes the scale format's maximum."""
    if fmt.rule.kind in (RuleKind.STD, RuleKind.PERCENTILE) and amax is None:
        largest, numerator = _largest(_raw_scale(blocks, measured, fmt)), fmt.scale.max_value
    else:
        divisor = fmt.rule.arguments[0] if fmt.rule.kind is RuleKind.THRESHOLD else fmt.element.max_value
        largest, numerator = _largest(measured if amax is None else amax), fmt.scale.max_value * divisor
    return inverse_scale(largest, numerator)


def inverse_scale(largest: Float[Tensor, "1"], numerator: float) -> Float[Tensor, "1"]:
    """Return (1 / largest) * numerator, each step rounded, as a finite float32, and 1 where ``largest`` is 0."""
    ratio = (largest.to(torch.float32).reciprocal() * numerator).clamp(max=FLOAT32_MAX)
    return torch.where(largest == 0, torch.ones_like(ratio), ratio)


def _largest(values: Tensor) -> Float[Tensor, "1"]:
    return values.amax().reshape(1) if values.numel() else values.new_zeros(1)


def _least_squares(blocks: Tensor, amax: Tensor, fmt: BlockFormat, tensor_inv: Tensor | None) -> BlockScales:
    """Try shrunk scales, refit each to its codes by least squares, keep the one with the least squared error."""
    full = quotient(amax, fmt.element.max_value)
    best = _from_raw(full, fmt, tensor_inv)
    best_error = _squared_error(blocks, best.factor, fmt)
    for factor in mse_factors(fmt.rule):
        start = full * factor
        codes = decode(encode(divide(blocks, start), fmt.element), fmt.element).to(torch.float64)
        energy = ordered_sum(codes.square())
        fitted = (ordered_sum(codes * blocks) / torch.where(energy > 0, energy, 1.0)).to(torch.float32)
        raw = torch.where(fitted > 0, fitted, 0.0).clamp(max=FLOAT32_MAX)  # not clamp(min=0): that may keep a -0
        candidate = _from_raw(raw, fmt, tensor_inv)
        error = _squared_error(blocks, candidate.factor, fmt)
        better = error < best_error
        best = BlockScales(
            torch.where(better, candidate.stored, best.stored),
            torch.where(better, candidate.factor, best.factor),
            tensor_inv,
        )
        best_error = torch.minimum(error, best_error)
    return best


@dataclass(frozen=True, slots=True)
class ZeroPointScales:
    """Scales and zero points of an asymmetric format; ``zero`` is the decoded float32 zero point."""

    scales: BlockScales
    stored_zero: Shaped[Tensor, "grid_rows grid_cols"]
    zero: Float[Tensor, "grid_rows grid_cols"]


def zero_point_scales(blocks: Float[Tensor, "grid_rows grid_cols size"], fmt: BlockFormat) -> ZeroPointScales:
    """Apply S = (max - min) / (2^b - 1), Z = round(-min / S) with S as stored.

    With an integer zero point the range is widened to include 0, so that Z is an integer code; so it is for a
    block whose Z would be past the largest number of an fp8 or fp16 zero point. A block of one repeated value c
    gets S = |c|, which represents it exactly.
    """
    assert isinstance(fmt.element, IntElement) and fmt.zero_point is not None
    low, high = blocks.amin(-1), blocks.amax(-1)
    raw = _range_step(low, high, fmt.element)
    limit = 0.0 if fmt.zero_point is ZeroPoint.INT else zero_point_element(fmt).max_value
    is_widened = low.abs() > limit * raw
    low = torch.where(is_widened, low.clamp(max=0), low)
    raw = torch.where(is_widened, _range_step(low, high.clamp(min=0), fmt.element), raw)
    tensor_inv = inverse_scale(_largest(raw), fmt.scale.max_value) if fmt.tensor_scale is not None else None
    scales = _from_raw(raw, fmt, tensor_inv)
    zero = torch.round(divide(-low.unsqueeze(-1), scales.factor).squeeze(-1))
    stored = encode_zero_point(zero, fmt)
    return ZeroPointScales(scales, stored, decode_zero_point(stored, fmt))


def _range_step(low: Tensor, high: Tensor, element: IntElement) -> Float[Tensor, "grid_rows grid_cols"]:
    raw = quotient((high - low).clamp(max=FLOAT32_MAX), element.max_code)
    return torch.where((raw == 0) & (low != 0), low.abs(), raw)


def encode_zero_point(zero: Float[Tensor, "..."], fmt: BlockFormat) -> Shaped[Tensor, "..."]:
    """Store zero points: integers of the element's width, E4M3 codes, or float16."""
    if fmt.zero_point is ZeroPoint.INT:
        assert isinstance(fmt.element, IntElement)
        return zero.clamp(0, fmt.element.max_code).to(torch.uint8)
    return encode_scale(zero, zero_point_element(fmt))
