"""How the linear kernels round their input on the fly: as integers where a format allows it, else as float32.

An activation format whose element values are small integers times a step multiplies integer weights exactly, in int32
over each block. Every other format that the compiled quantize takes is rounded first and multiplied as float32. Both
use the encoder of quantize, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from microscale.formats import BlockFormat, Format, NaNPolicy, PairFormat, SegmentedFormat, format_name
from microscale.kernels.cpu.descriptors import descriptor, encode_refusal
from microscale.kernels.cpu.enums import ActRule
from microscale.kernels.cpu.native import NATIVE


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
    struct = descriptor(activations)
    rule = ActRule.INTEGER if struct.products.act_step else ActRule.NUMBER
    handle = NATIVE.make_act_format(ctypes.addressof(struct))
    return ActivationPlan(rule=rule, handle=handle, kept=struct)
