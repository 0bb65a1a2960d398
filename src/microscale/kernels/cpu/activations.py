"""How the linear kernels round their input on the fly: as integers where a format allows it, else as float32.

An activation format whose element values are small integers times a step multiplies integer weights exactly, in int32
over each block. Every other format that the compiled quantize takes is rounded first and multiplied as float32. Both
use the encoder of quantize, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from microscale.formats import (
    BlockFormat,
    ChannelBlock,
    Format,
    IntElement,
    NaNPolicy,
    PairFormat,
    SegmentedFormat,
    VectorBlock,
    format_name,
)
from microscale.formats.codec import value_table
from microscale.kernels.cpu.descriptors import descriptor, encode_refusal
from microscale.kernels.cpu.native import NATIVE

INT8_MAX = 127


class ActRule(IntEnum):
    """How activations are used (``ms::ActRule``)."""

    KEEP = 0
    INTEGER = 1
    NUMBER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPlan:
    """What the kernels do with an input: the rule, the format as the extension knows it, and the memory of that."""

    rule: ActRule
    handle: Any = None
    kept: Any = None


KEPT = ActivationPlan(rule=ActRule.KEEP)


def activation_refusal(activations: Format | None) -> str | None:
    """Return why the kernels cannot round their input to a format on the fly, or None where they can."""
    if activations is None:
        return None
    if isinstance(activations, SegmentedFormat):
        return next((reason for s in activations.segments if (reason := activation_refusal(s.format))), None)
    if isinstance(activations, PairFormat) or activations.sparse is not None:
        return f"{format_name(activations)} chooses among all numbers of a tensor"
    if activations.zero_point is not None:
        return f"{format_name(activations)} has zero points"
    if activations.nan_policy is NaNPolicy.RAISE:
        return f"{format_name(activations)} refuses NaN with an error of its own"
    return encode_refusal(activations)


@functools.lru_cache(maxsize=256)
def plan_activations(activations: Format | None) -> ActivationPlan:
    """Return how the kernels execute an activation format without :func:`activation_refusal`."""
    if activations is None:
        return KEPT
    assert NATIVE is not None and isinstance(activations, BlockFormat)
    integers = _integers(activations)
    rule = ActRule.NUMBER if integers is None else ActRule.INTEGER
    codes, largest, step = integers or ([], [], 1.0)
    struct = descriptor(activations)
    handle = NATIVE.make_act_format(ctypes.addressof(struct), codes, largest, step)
    return ActivationPlan(rule=rule, handle=handle, kept=struct)


def _integers(fmt: BlockFormat) -> tuple[list[int], list[int], float] | None:
    """Return the integer of every element code and largest code, and their step; None where they are not integers."""
    block = fmt.block
    if not isinstance(block, ChannelBlock) and not (isinstance(block, VectorBlock) and _fits_chunks(block.size)):
        return None
    if fmt.delta_bits or (fmt.is_extended and not fmt.has_zero_code):
        return None
    values = value_table(fmt.element).tolist()
    step = fmt.element.value(1) if isinstance(fmt.element, IntElement) else min(abs(v) for v in values if v)
    codes = _whole(values, step)
    largest: list[int] | None = []
    if fmt.is_extended:
        largest = _whole(fmt.largest_values(), step)
    if codes is None or largest is None or not 2.0**-60 <= step <= 2.0**60:
        return None
    return codes, largest, step


def _fits_chunks(size: int) -> bool:
    return size == 16 or size % 32 == 0


def _whole(values: list[float], step: float) -> list[int] | None:
    """Return the values in steps, where they are whole numbers of a signed byte."""
    whole = [value / step for value in values]
    if not all(math.isfinite(value) and value.is_integer() and -128 <= value <= INT8_MAX for value in whole):
        return None
    return [int(value) for value in whole]
