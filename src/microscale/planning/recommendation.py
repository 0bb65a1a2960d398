"""Which element, block size and scale rule suits a class of tensors: every combination is tried on a sample.

The narrowest format whose signal-to-quantization-noise ratio (QSNR = 10 log10(Σ x² / Σ (x - x')²), decibels) reaches
the target is recommended; among formats of equal bits the one with the highest. Where none does, the best of all is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from microscale.errors import counted
from microscale.formats import BlockFormat, FloatElement, parse_format
from microscale.kernels import fake_quantize
from microscale.planning.tensor_facts import noise_and_power

DEFAULT_TARGET_DB = 20.0
NORMAL_CREST = 2.3
"""Mean crest factor of 32 numbers from a normal distribution (simulated, two digits)."""

ELEMENTS = ("e2m1", "e1m2", "int4", "e2m3", "e3m2", "e4m3", "e5m2", "int8")
BLOCKS = (16, 32, 64)
RULES = ("floor", "even", "rceil", "threshold(7.25)")
_E2M1_RULES = ("threshold(7.25)",)
"""Rules whose argument is a number of E2M1's scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedFormat:
    """A format with its bits per value and QSNR in decibels on the sample."""

    format: str
    bits: float
    qsnr_db: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """What suits a class of tensors, and why."""

    role: str
    side: str
    format: str
    exponent_bits: int
    mantissa_bits: int
    block_size: int
    scale: str
    rule: str
    bits: float
    qsnr_db: float
    reason: str


def qsnr(values: Float[Tensor, "rows cols"], rounded: Float[Tensor, "rows cols"]) -> float:
    """Return the QSNR in decibels; +Inf without an error, 0 for values that are all zero."""
    noise, power = noise_and_power(values, rounded)
    if noise == 0:
        return math.inf if power else 0.0
    return 10 * math.log10(power / noise) if power else -math.inf


def tried_formats() -> list[str]:
    """Return the specs of all combinations: powers of two in every rule, and two-level scales for blocks of 16.

    Those are NVFP4's: E4M3 for a block, and float32 for the tensor, without which small tensors would fall below E4M3.
    """
    found: list[str] = []
    for element in ELEMENTS:
        rules = [rule for rule in RULES if element == "e2m1" or rule not in _E2M1_RULES]
        found += [f"{element}/{block}:e8m0:{rule}" for block in BLOCKS for rule in rules]
        if element in ("e2m1", "e1m2", "int4"):
            found.append(f"{element}/16:e4m3+fp32:amax")
    return found


def recommend(
    pieces: Sequence[Float[Tensor, "rows cols"]],
    *,
    role: str,
    side: str,
    crest: float,
    kurtosis: float,
    outliers: int,
    target_db: float = DEFAULT_TARGET_DB,
) -> Recommendation:
    """Try every format on samples of the tensors of a class; ``crest``, ``kurtosis``, ``outliers`` go into the words.

    Every tensor weighs the same: the QSNR is that of the mean relative noise. A scale of the whole tensor is taken from
    each sample by itself.
    """
    tried = [_try(spec, pieces) for spec in tried_formats()]
    good = [one for one in tried if one.qsnr_db >= target_db]
    if good:
        best = min(good, key=lambda one: (one.bits, -one.qsnr_db))
    else:
        best = max(tried, key=lambda one: (one.qsnr_db, -one.bits))
    fmt = parse_format(best.format)
    assert isinstance(fmt, BlockFormat)
    element = fmt.element
    exponent = element.exponent_bits if isinstance(element, FloatElement) else 0
    words = best.format.split(":")
    rule = ":".join(words[2:]) or fmt.rule.kind.value
    return Recommendation(
        role=role,
        side=side,
        format=best.format,
        exponent_bits=exponent,
        mantissa_bits=element.bits - 1 - exponent,
        block_size=int(words[0].split("/")[1]),
        scale=words[1],
        rule=rule,
        bits=best.bits,
        qsnr_db=best.qsnr_db,
        reason=_reason(best, tried, crest, kurtosis, outliers, target_db, is_reached=bool(good)),
    )


def _try(spec: str, pieces: Sequence[Tensor]) -> TriedFormat:
    fmt = parse_format(spec)
    values = torch.cat(list(pieces))
    if isinstance(fmt, BlockFormat) and fmt.tensor_scale is not None:
        rounded = torch.cat([fake_quantize(piece, fmt) for piece in pieces])
    else:  # blocks know nothing of each other: one call will do
        rounded = fake_quantize(values, fmt)
    return TriedFormat(format=spec, bits=fmt.bits_per_value(), qsnr_db=_mean_qsnr(values, rounded, pieces))


def _mean_qsnr(values: Tensor, rounded: Tensor, pieces: Sequence[Tensor]) -> float:
    """Return the QSNR of the mean relative noise of pieces, so that no tensor weighs more for being larger."""
    noise = (rounded - values).square().sum(-1, dtype=torch.float64)
    power = values.square().sum(-1, dtype=torch.float64)
    sizes = [piece.shape[0] for piece in pieces]
    pairs = zip(noise.split(sizes), power.split(sizes), strict=True)
    shares = [float(lost.sum() / given.sum()) for lost, given in pairs if float(given.sum()) > 0]
    mean = sum(shares) / len(shares) if shares else 0.0
    return -10 * math.log10(mean) if mean else math.inf


def _reason(
    best: TriedFormat,
    tried: Sequence[TriedFormat],
    crest: float,
    kurtosis: float,
    outliers: int,
    target_db: float,
    *,
    is_reached: bool,
) -> str:
    shape = "close to a normal distribution's" if crest < 1.15 * NORMAL_CREST else "larger than a normal distribution's"
    words = [
        f"Blocks of 32 have a mean crest factor of {crest:.2f}, {shape} {NORMAL_CREST}; kurtosis is {kurtosis:.3g}"
    ]
    if outliers:
        words[0] += f", and {counted(outliers, 'channel stands out', 'channels stand out')}"
    if is_reached:
        words.append(f"{best.format} is the narrowest that reaches {target_db:g} dB, with {best.qsnr_db:.1f} dB")
    else:
        words.append(f"no format tried reaches {target_db:g} dB; {best.format} is the best with {best.qsnr_db:.1f} dB")
    below = [one for one in tried if one.bits < best.bits]
    if below and is_reached:
        next_one = max(below, key=lambda one: one.qsnr_db)
        words.append(f"the best of fewer bits, {next_one.format}, gives {next_one.qsnr_db:.1f} dB")
    head, _, tail = best.format.partition("/")
    others = [one for one in tried if one.format != best.format and one.format.partition("/")[2] == tail]
    same = [one for one in others if one.bits == best.bits]
    if same:
        other = max(same, key=lambda one: one.qsnr_db)
        gain, name = best.qsnr_db - other.qsnr_db, other.format.partition("/")[0]
        words.append(f"{head} beats {name} by {gain:.1f} dB there" if gain >= 0.05 else f"{name} would do as well")
    return "; ".join(words) + "."
