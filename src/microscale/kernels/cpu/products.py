"""How linear multiplies by elements of a format: what only linear reads of a format's record (``ms::Products``).

The kernels hold no fact about a format. Which elements are small integers, which are exact in bfloat16 and what the
largest element of a block adds is worked out here, once for each format, and handed over as numbers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from microscale.formats import BlockFormat, ChannelBlock, FloatElement, IntElement, VectorBlock, ZeroPoint
from microscale.formats.block import PLUSPLUS_DELTA_BITS
from microscale.formats.codec import value_table
from microscale.formats.elements import BF16, E8M0, FP16
from microscale.kernels.cpu.enums import ElementKind, Extra, ScaleKind, ZeroKind
from microscale.kernels.cpu.largest import compact_largest, low_values

INT_LIMIT = 63
"""Largest magnitude of the integers of a table: unsigned pairs of them times bytes stay within 16 bits."""
INT8_MAX = 127
NO_CODE = 1 << 20
"""Past every code."""
_I, _F = ctypes.c_int32, ctypes.c_float


def fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    """Return fields of a C struct that have one type."""
    return [(name, kind) for name in names]


class ProductsStruct(ctypes.Structure):
    """``ms::Products``."""

    _fields_ = [
        *fields(_I, "element", "extra", "scale", "zero", "special_code"),
        ("low_values", _F * 8),
        ("largest_values", _F * 256),
        ("delta_values", _F * 8),
        ("int_planes", _I),
        ("int_offset", _I * 2),
        ("int_values", _I * 64 * 2),
        ("int_step", _F),
        *fields(_I, "low_is_int", "bf16_exact"),
        ("bf16_values", _I * 32),
        *fields(_I * 256, "act_integers", "act_largest"),
        ("act_step", _F),
    ]


def products(fmt: BlockFormat) -> ProductsStruct:
    """Return how linear multiplies by a format of elements of up to 8 bits."""
    element = fmt.element
    values: list[float] = value_table(element).tolist()
    has_special = isinstance(element, FloatElement) and element.nan_code is not None
    result = ProductsStruct(
        element=_element_kind(fmt),
        extra=_extra(fmt),
        scale=_scale_kind(fmt),
        zero=ZeroKind.F16 if fmt.zero_point is ZeroPoint.FP16 else ZeroKind.TABLE,
        special_code=element.max_code + 1 if has_special else NO_CODE,
        int_step=1.0,
        act_step=0.0,
    )
    low: list[float] = []
    if result.extra == Extra.LOW:
        low = low_values(fmt)
        result.low_values[:] = low
    elif result.extra == Extra.LARGEST:
        largest = fmt.largest_values()
        result.largest_values[: len(largest)] = largest
    result.delta_values[:] = [2.0**-delta if fmt.delta_bits else 1.0 for delta in range(2**PLUSPLUS_DELTA_BITS)]
    _fill_integers(result, fmt, values, low)
    _fill_bf16(result, fmt, values)
    _fill_activations(result, fmt, values)
    return result


def _element_kind(fmt: BlockFormat) -> ElementKind:
    element = fmt.element
    if element.bits == 8 and isinstance(element, IntElement):
        return ElementKind.INTEGER
    if isinstance(element, FloatElement) and element.bits == 8 and _has_plain_fields(element):
        return ElementKind.FLOAT8
    return ElementKind.TABLE


def _has_plain_fields(element: FloatElement) -> bool:
    """Whether the fields of an 8-bit float can be read as those of a float32: its smallest normal value is one."""
    return element.signed and 1 <= element.mantissa_bits <= 6 and -100 <= element.bias <= 100


def _extra(fmt: BlockFormat) -> Extra:
    if fmt.zero_point is not None:
        return Extra.ZERO_POINT
    if not fmt.is_extended:
        return Extra.NONE
    return Extra.LOW if compact_largest(fmt) is not None else Extra.LARGEST


def _scale_kind(fmt: BlockFormat) -> ScaleKind:
    if fmt.scale.bits <= 8:
        is_shift = fmt.scale == E8M0 and fmt.rule.multiplier == 1.0
        return ScaleKind.POWER_OF_TWO if is_shift else ScaleKind.TABLE
    return {FP16: ScaleKind.F16, BF16: ScaleKind.BF16}.get(fmt.scale, ScaleKind.F32)


def _fill_integers(result: ProductsStruct, fmt: BlockFormat, values: Sequence[float], low: Sequence[float]) -> None:
    """Write the values as integers of one or two bytes, where they are."""
    element = fmt.element
    if element.bits == 8:
        if isinstance(element, IntElement):
            result.int_planes, result.int_step = 1, 2.0**-element.fraction_bits
            result.int_offset[0] = 128 if element.signed else 0
        return
    if element.bits > 6 or not all(math.isfinite(value) for value in values):
        return
    step = min((abs(value) for value in values if value), default=1.0)
    whole = [value / step for value in values]
    if not all(value.is_integer() for value in whole) or not 2.0**-60 <= step <= 2.0**60:
        return
    integers = [int(value) for value in whole]
    top = max(abs(value) for value in integers) + int(max(low, default=0.0) / step)  # with room for a whole low part
    if top <= INT_LIMIT:
        planes, offsets = [integers], [top if min(integers) < 0 else 0]
    elif element.bits == 6 and top < 16 * INT_LIMIT and not fmt.is_extended:
        planes = [[int(math.copysign(abs(value) % 16, value)) for value in integers]]
        planes.append([int(math.copysign(abs(value) // 16, value)) for value in integers])
        offsets = [max(abs(value) for value in plane) for plane in planes]
    else:
        return
    result.int_planes, result.int_step = len(planes), step
    for place, (plane, offset) in enumerate(zip(planes, offsets, strict=True)):
        result.int_offset[place] = offset
        result.int_values[place][: len(plane)] = [value + offset for value in plane]
    result.low_is_int = len(planes) == 1 and bool(low) and all((value / step).is_integer() for value in low)


def _fill_bf16(result: ProductsStruct, fmt: BlockFormat, values: Sequence[float]) -> None:
    """Write the magnitudes as bfloat16 bits, where every value is a normal one or zero."""
    element = fmt.element
    if fmt.zero_point is not None:
        return
    if element.bits == 8:
        if isinstance(element, FloatElement) and _has_plain_fields(element):
            result.bf16_exact = element.exponent_bits >= 2 and element.bias >= 1
        return
    if element.bits not in (4, 6) or (element.bits == 6 and not isinstance(element, FloatElement)):
        return
    if isinstance(element, FloatElement) and not element.signed and element.bits == 6:
        return
    exact = torch.tensor(values, dtype=torch.float32)
    rounded = exact.to(torch.bfloat16)
    is_normal = (exact == 0) | ((exact.abs() >= 2.0**-60) & (exact.abs() <= 2.0**20))
    if not bool(((rounded.float() == exact) & is_normal).all()):
        return
    bits = [pattern & 0xFFFF for pattern in rounded.view(torch.int16).tolist()]
    result.bf16_exact = 1
    result.bf16_values[:] = bits * 2 if element.bits == 4 else bits[:32]


def _fill_activations(result: ProductsStruct, fmt: BlockFormat, values: Sequence[float]) -> None:
    """Write the integers of every element code and largest code with their step, where they are signed bytes."""
    block = fmt.block
    is_fit = isinstance(block, ChannelBlock) or (isinstance(block, VectorBlock) and _fits_chunks(block.size))
    if not is_fit or fmt.zero_point is not None or fmt.delta_bits or (fmt.is_extended and not fmt.has_zero_code):
        return
    step = fmt.element.value(1) if isinstance(fmt.element, IntElement) else min(abs(v) for v in values if v)
    codes = _whole(values, step)
    largest = _whole(fmt.largest_values(), step) if fmt.is_extended else []
    if codes is None or largest is None or not 2.0**-60 <= step <= 2.0**60:
        return
    result.act_integers[: len(codes)] = codes
    result.act_largest[: len(largest)] = largest
    result.act_step = step


def _fits_chunks(size: int) -> bool:
    return size == 16 or size % 32 == 0


def _whole(values: Sequence[float], step: float) -> list[int] | None:
    """Return the values in steps, where they are whole numbers of a signed byte."""
    whole = [value / step for value in values]
    if not all(math.isfinite(value) and value.is_integer() and -128 <= value <= INT8_MAX for value in whole):
        return None
    return [int(value) for value in whole]
