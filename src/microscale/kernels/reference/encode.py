"""From numbers to codes: one matrix in any block format, in plain vectorised torch.

The steps of :func:`encode_matrix`, in order: policies for NaN and Inf; blocks; scales by the rule; the second
scale inside the block; division by the block's factor; rounding; the largest element of MX+ and MX++.
Nothing is packed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor

from microscale.errors import NonFiniteError, counted
from microscale.formats import BlockFormat, Draw, Extension, Format, InfPolicy, NaNPolicy, Rounding, SubScaleKind
from microscale.formats.block import PLUSPLUS_DELTA_BITS
from microscale.formats.codec import encode, encode_scale, has_largest, random_bits, round_to_int
from microscale.kernels.reference.blocking import to_blocks
from microscale.kernels.reference.scales import (
    FLOAT32_MAX,
    BlockScales,
    block_scales,
    divide,
    floor_log2,
    zero_point_scales,
)
from microscale.layouts.row_major import padded_cols


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBlocks:
    """Codes and scales of all blocks, one integer each, nothing packed."""

    codes: Integer[Tensor, "grid_rows grid_cols size"]
    scale: Shaped[Tensor, "grid_rows grid_cols"]
    tensor_inv_scale: Float[Tensor, "1"] | None = None
    sub_scale: Integer[Tensor, "grid_rows grid_cols groups"] | None = None
    zero_point: Shaped[Tensor, "grid_rows grid_cols"] | None = None
    max_idx: Integer[Tensor, "grid_rows grid_cols"] | None = None
    delta: Integer[Tensor, "grid_rows grid_cols"] | None = None


def refuse_nonfinite(values: Float[Tensor, "..."], fmt: Format, name: str) -> None:
    """Refuse NaN, and Inf where it counts as NaN, under the policy ``nan_raise``.

    Raises:
        NonFiniteError: with the name and the count.
    """
    if fmt.nan_policy is not NaNPolicy.RAISE:
        return
    is_bad = torch.isnan(values) if fmt.inf_policy is InfPolicy.SATURATE else ~torch.isfinite(values)
    num_bad = int(is_bad.sum())
    if num_bad:
        raise NonFiniteError(nonfinite_message(name, num_bad, values.numel()))


def nonfinite_message(name: str, num_bad: int, count: int) -> str:
    """Return what every backend says of NaN and Inf under the policy ``nan_raise``."""
    return (
        f"{name} holds {counted(num_bad, 'NaN or Inf value')} out of {count}; mend the data, or poison their"
        " blocks instead (format option nan_poison, --nan poison on the command line)"
    )


def float32_values(values: Float[Tensor, "..."], fmt: Format) -> Float[Tensor, "..."]:
    """Return float32 numbers, Inf replaced by the largest under ``inf_saturate``; what is left poisons its block."""
    values = values.to(torch.float32)
    return values.clamp(-FLOAT32_MAX, FLOAT32_MAX) if fmt.inf_policy is InfPolicy.SATURATE else values


def _is_any(flags: Tensor) -> bool:
    """Whether a flag is set; on ``meta``, where there are no numbers, none is."""
    return not flags.is_meta and bool(flags.any())


def encode_matrix(
    matrix: Float[Tensor, "rows cols"],
    fmt: BlockFormat,
    amax: Float[Tensor, "..."] | None = None,
    draw: Draw | None = None,
) -> EncodedBlocks:
    """Quantize a float32 matrix whose policies have been applied; NaN and Inf poison their block."""
    blocks = to_blocks(matrix, fmt.block)
    is_bad = ~torch.isfinite(blocks)
    poisoned = is_bad.any(-1)
    if _is_any(poisoned):
        blocks = torch.where(poisoned.unsqueeze(-1), 0.0, blocks)
    noise = _noise(matrix, fmt, draw or fmt.default_draw) if fmt.rounding is Rounding.STOCHASTIC else None
    if fmt.zero_point is not None:
        encoded = _encode_asymmetric(blocks, fmt, noise)
    else:
        encoded = _encode_symmetric(blocks, fmt, noise, amax)
    return _poison(encoded, poisoned, fmt)


def _noise(matrix: Tensor, fmt: BlockFormat, draw: Draw) -> Integer[Tensor, "grid_rows grid_cols size"]:
    """Random bits of each element by its place row * padded_cols + col."""
    rows, cols = matrix.shape
    width = padded_cols(fmt.block, cols)
    places = torch.arange(rows * width, device=matrix.device).reshape(rows, width)
    return random_bits(to_blocks(places, fmt.block), draw)


def _encode_asymmetric(blocks: Tensor, fmt: BlockFormat, noise: Tensor | None) -> EncodedBlocks:
    found = zero_point_scales(blocks, fmt)
    shifted = divide(blocks, found.scales.factor) + found.zero.unsqueeze(-1)
    codes = encode(shifted, fmt.element, rounding=fmt.rounding, overflow=fmt.overflow, noise=noise)
    return EncodedBlocks(
        codes=codes, scale=found.scales.stored, tensor_inv_scale=found.scales.tensor_inv, zero_point=found.stored_zero
    )


def _encode_symmetric(blocks: Tensor, fmt: BlockFormat, noise: Tensor | None, amax: Tensor | None) -> EncodedBlocks:
    scales = block_scales(blocks, fmt, amax)
    if fmt.is_extended:
        return _encode_extended(blocks, fmt, noise, scales)
    sub_codes: Tensor | None = None
    factor = scales.factor.unsqueeze(-1)
    values = blocks
    if fmt.sub_scale is not None:
        values = blocks.unflatten(-1, (-1, fmt.sub_scale.size))
        sub_codes = _sub_scale_codes(values.abs().amax(-1), factor, fmt)
        factor = sub_factor(factor, sub_codes, fmt)
        values = divide(values, factor).flatten(-2)
    else:
        values = divide(values, scales.factor)
    codes = encode(values, fmt.element, rounding=fmt.rounding, overflow=fmt.overflow, noise=noise)
    return EncodedBlocks(codes=codes, scale=scales.stored, tensor_inv_scale=scales.tensor_inv, sub_scale=sub_codes)


def sub_factor(
    factor: Float[Tensor, "... 1"], sub_codes: Integer[Tensor, "... groups"], fmt: BlockFormat
) -> Float[Tensor, "... groups"]:
    """Return the factor of each sub-group: factor * 2^-k, or factor * (k + 1) / 2^bits."""
    assert fmt.sub_scale is not None
    if fmt.sub_scale.kind is SubScaleKind.POWER_OF_TWO:
        return factor * torch.pow(2.0, -sub_codes.to(torch.float32))
    return factor * ((sub_codes.to(torch.float32) + 1) / 2**fmt.sub_scale.bits)


def _sub_scale_codes(group_amax: Tensor, factor: Tensor, fmt: BlockFormat) -> Integer[Tensor, "... groups"]:
    """Pick the smallest factor that does not clip the sub-group, or the whole factor where all of them clip."""
    assert fmt.sub_scale is not None
    is_power = fmt.sub_scale.kind is SubScaleKind.POWER_OF_TWO
    top = 2**fmt.sub_scale.bits - 1
    best = torch.full(group_amax.shape, 0 if is_power else top, dtype=torch.uint8, device=group_amax.device)
    candidates = range(1, top + 1) if is_power else range(top - 1, -1, -1)
    for code in candidates:
        candidate = torch.full_like(best, code)
        fits = group_amax <= sub_factor(factor, candidate, fmt) * fmt.element.max_value
        best = torch.where(fits, candidate, best)
    return best


def _encode_extended(blocks: Tensor, fmt: BlockFormat, noise: Tensor | None, scales: BlockScales) -> EncodedBlocks:
    """MX+ and MX++ (arXiv 2510.14557 §4): the first largest element takes its exponent bits for mantissa."""
    magnitude = blocks.abs()
    max_idx = magnitude.argmax(-1, keepdim=True)
    factor = scales.factor
    delta: Tensor | None = None
    if fmt.extension is Extension.PLUSPLUS:
        others = magnitude.scatter(-1, max_idx, 0.0).amax(-1)
        delta = _exponent_difference(others, scales.stored, fmt)
        factor = factor * torch.pow(2.0, -delta.to(torch.float32))
    codes = encode(divide(blocks, factor), fmt.element, rounding=fmt.rounding, noise=noise)
    largest = divide(blocks.gather(-1, max_idx), scales.factor)
    largest_noise = None if noise is None else noise.gather(-1, max_idx)
    largest_codes = encode_largest(largest, fmt, largest_noise)
    is_own = has_largest(scales.stored, fmt)
    delta = None if delta is None else torch.where(is_own, delta, 0)
    is_own = is_own.unsqueeze(-1)
    codes = torch.where(is_own, codes.scatter(-1, max_idx, largest_codes), 0 if fmt.has_zero_code else codes)
    max_idx = torch.where(is_own, max_idx, 0)
    return EncodedBlocks(
        codes=codes, scale=scales.stored, tensor_inv_scale=scales.tensor_inv, max_idx=max_idx.squeeze(-1), delta=delta
    )


def _exponent_difference(others: Tensor, stored: Tensor, fmt: BlockFormat) -> Integer[Tensor, "grid_rows grid_cols"]:
    """MX++: shared exponent minus the exponent of the others, floor(log2 max) - e_max + 1, clipped to 0..7."""
    shared = stored.to(torch.int32) - fmt.scale.bias
    wanted = floor_log2(others) - fmt.element.max_exponent + 1
    limit = stored.to(torch.int32).clamp(max=2**PLUSPLUS_DELTA_BITS - 1)
    return torch.minimum((shared - wanted).clamp(min=0), limit)


def encode_largest(scaled: Tensor, fmt: BlockFormat, noise: Tensor | None = None) -> Integer[Tensor, "..."]:
    """Encode |x| = 2^e_max * (1 + f / 2^B) as sign and B fraction bits, saturating at both ends."""
    bits = fmt.magnitude_bits
    fraction = (scaled.abs() * 2.0**-fmt.element.max_exponent - 1) * 2.0**bits
    codes = round_to_int(fraction, fmt.rounding, noise).clamp(0, 2**bits - 1).to(torch.int32)
    codes = torch.where(torch.signbit(scaled), codes | (1 << bits), codes)
    return codes.to(torch.uint8) if fmt.element.bits <= 8 else codes


def _poison(encoded: EncodedBlocks, poisoned: Bool[Tensor, "grid_rows grid_cols"], fmt: BlockFormat) -> EncodedBlocks:
    if not _is_any(poisoned):
        return encoded
    nan = torch.full((1,), float("nan"), device=poisoned.device)
    nan_scale = encode_scale(nan, fmt.scale)
    return replace(encoded, scale=torch.where(poisoned, nan_scale, encoded.scale))
