"""What the linear kernels are told about a weight: tables and parameters made from the format record.

The kernels hold no fact about a format. The value of every code, what a scale code stands for, which elements are small
integers and which are exact in bfloat16 is worked out here, once for each format, and handed over as numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from microscale.errors import KernelError
from microscale.formats import (
    BlockFormat,
    FloatElement,
    IntElement,
    SparseElement,
    VectorBlock,
    ZeroPoint,
    format_name,
)
from microscale.formats.block import PLUSPLUS_DELTA_BITS
from microscale.formats.codec import decode, decode_zero_point, value_table
from microscale.formats.elements import BF16, E4M3, E8M0, FP16
from microscale.kernels.cpu.largest import compact_largest, low_values
from microscale.kernels.cpu.native import NATIVE
from microscale.kernels.cpu.rows16 import NAME as ROWS16
from microscale.kernels.reference.scales import scale_factor
from microscale.tensor import QuantizedTensor


class ScaleKind(IntEnum):
    """How a stored scale becomes a factor (``ms::ScaleKind``)."""

    POWER_OF_TWO = 0
    TABLE = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    FLOAT32 = 4


class Extra(IntEnum):
    """What a block has beside elements and scale (``ms::Extra``)."""

    NONE = 0
    LOW = 1
    LARGEST = 2
    ZERO_POINT = 3


class ElementKind(IntEnum):
    """How element codes become floats (``ms::ElementKind``)."""

    TABLE = 0
    INTEGER = 1
    FLOAT8 = 2


INT_LIMIT = 63
"""Largest magnitude of the integers of a table: unsigned pairs of them times bytes stay within 16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A weight as the extension knows it, with the tensors whose memory it points into."""

    handle: Any
    rows: int
    cols: int
    num_bytes: int
    kept: tuple[Tensor, ...]


def pack_weight(tensor: QuantizedTensor) -> PackedWeight:
    """Describe a quantized weight [rows, cols] in the layout rows16 to the kernels; nothing is copied.

    Raises:
        KernelError: another layout, or a device other than the CPU.
    """
    if tensor.layout != ROWS16 or not isinstance(tensor.format, BlockFormat) or tensor.device.type != "cpu":
        raise KernelError(
            f"the CPU kernels read weights of the layout {ROWS16} on the CPU, got {format_name(tensor.format)} in"
            f" {tensor.layout} on {tensor.device}; lay the tensor out first"
        )
    assert NATIVE is not None
    parts = {name: part.contiguous() for name, part in tensor.parts.items()}
    kept = list(parts.values())
    description = dict(_format_tables(tensor.format))
    description.update(rows=tensor.rows, cols=tensor.cols, scale_cols=parts["scale"].shape[1])
    description.update(_scale_tables(tensor.format, parts.get("tensor_inv_scale")))
    for name in ("codes", "scale", "index", "largest", "zero_point", "subnormals"):
        description[name] = parts[name].data_ptr() if name in parts else 0
    description.update(_sparse_table(tensor.format, parts, kept))
    return PackedWeight(
        handle=NATIVE.make_weight(description),
        rows=tensor.rows,
        cols=tensor.cols,
        num_bytes=tensor.num_bytes,
        kept=tuple(kept),
    )


@functools.lru_cache(maxsize=256)
def _format_tables(fmt: BlockFormat) -> Mapping[str, Any]:
    element = fmt.element
    values = value_table(element).tolist()
    tables: dict[str, Any] = {
        "bits": element.bits,
        "block": fmt.block.size if isinstance(fmt.block, VectorBlock) else 0,
        "element": _element_kind(fmt),
        "extra": _extra(fmt),
        "values": values,
        "mantissa_bits": element.mantissa_bits,
        "bias": element.bias if isinstance(element, FloatElement) else 0,
        "special_code": _special_code(fmt),
        "is_signed": int(element.signed),
    }
    tables.update(_largest_tables(fmt))
    tables.update(_zero_tables(fmt))
    tables.update(_int_tables(fmt, values))
    tables["low_is_int"] = int(_low_is_int(tables))
    tables.update(_bf16_tables(fmt, values))
    return tables


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


def _special_code(fmt: BlockFormat) -> int:
    element = fmt.element
    return element.max_code + 1 if isinstance(element, FloatElement) and element.nan_code is not None else 1 << 20


def _extra(fmt: BlockFormat) -> Extra:
    if fmt.zero_point is not None:
        return Extra.ZERO_POINT
    if not fmt.is_extended:
        return Extra.NONE
    return Extra.LOW if compact_largest(fmt) is not None else Extra.LARGEST


def _largest_tables(fmt: BlockFormat) -> dict[str, Any]:
    low: list[float] = []
    largest: list[float] = []
    if _extra(fmt) is Extra.LOW:
        low = low_values(fmt)
    elif _extra(fmt) is Extra.LARGEST:
        largest = fmt.largest_values()
    has_delta = bool(fmt.delta_bits)
    deltas = [2.0**-delta if has_delta else 1.0 for delta in range(2**PLUSPLUS_DELTA_BITS)]
    return {"low_values": low, "largest_values": largest, "delta_values": deltas}


def _zero_tables(fmt: BlockFormat) -> dict[str, Any]:
    if fmt.zero_point in (None, ZeroPoint.FP16):
        return {"zero_kind": int(fmt.zero_point is ZeroPoint.FP16), "zero_values": []}
    codes = torch.arange(256, dtype=torch.uint8)
    return {"zero_kind": 0, "zero_values": decode_zero_point(codes, fmt).tolist()}


def _int_tables(fmt: BlockFormat, values: list[float]) -> dict[str, Any]:
    """The element values as integers of one or two bytes, or ``int_planes`` 0 where they are not."""
    none = {"int_planes": 0, "int_offset": [0, 0], "int_values": [], "int_high_values": [], "int_step": 1.0}
    element = fmt.element
    if element.bits == 8:
        if not isinstance(element, IntElement):
            return none
        offset = 128 if element.signed else 0
        step = 2.0**-element.fraction_bits
        return {**none, "int_planes": 1, "int_offset": [offset, 0], "int_step": step}
    if element.bits > 6 or not all(math.isfinite(value) for value in values):
        return none
    step = min((abs(value) for value in values if value), default=1.0)
    whole = [value / step for value in values]
    if not all(value.is_integer() for value in whole) or not 2.0**-60 <= step <= 2.0**60:
        return none
    integers = [int(value) for value in whole]
    top = max(abs(value) for value in integers)
    if _extra(fmt) is Extra.LOW:  # room for the low part, where it is a whole number
        top += int(max(low_values(fmt)) / step)
    lowest = min(integers)
    if top <= INT_LIMIT:
        offset = top if lowest < 0 else 0
        return {
            **none,
            "int_planes": 1,
            "int_offset": [offset, 0],
            "int_values": [value + offset for value in integers],
            "int_step": step,
        }
    if element.bits != 6 or top >= 16 * INT_LIMIT or fmt.is_extended:
        return none
    low = [int(math.copysign(abs(value) % 16, value)) for value in integers]
    high = [int(math.copysign(abs(value) // 16, value)) for value in integers]
    offsets = [max(abs(value) for value in plane) for plane in (low, high)]
    return {
        "int_planes": 2,
        "int_offset": offsets,
        "int_values": [value + offsets[0] for value in low],
        "int_high_values": [value + offsets[1] for value in high],
        "int_step": step,
    }


def _low_is_int(tables: Mapping[str, Any]) -> bool:
    """Whether the largest element of a compact MX+ is an integer in the unit of all others."""
    if tables["int_planes"] != 1 or not tables["low_values"] or tables["bits"] == 8:
        return False
    low = [value / tables["int_step"] for value in tables["low_values"]]
    return all(value.is_integer() for value in low)


def _bf16_tables(fmt: BlockFormat, values: list[float]) -> dict[str, Any]:
    """The magnitudes as bfloat16 bits, where every value is a normal one or zero."""
    element = fmt.element
    none = {"bf16_exact": 0, "bf16_values": []}
    if fmt.zero_point is not None:
        return none
    if element.bits == 8:
        is_fit = _element_kind(fmt) is ElementKind.FLOAT8 and isinstance(element, FloatElement)
        is_fit = is_fit and isinstance(element, FloatElement) and element.exponent_bits >= 2 and element.bias >= 1
        return {**none, "bf16_exact": int(is_fit)}
    if element.bits not in (4, 6) or (element.bits == 6 and not isinstance(element, FloatElement)):
        return none
    if isinstance(element, FloatElement) and not element.signed and element.bits == 6:
        return none
    exact = torch.tensor(values, dtype=torch.float32)
    rounded = exact.to(torch.bfloat16)
    is_normal = (exact == 0) | ((exact.abs() >= 2.0**-60) & (exact.abs() <= 2.0**20))
    if not bool(((rounded.float() == exact) & is_normal).all()):
        return none
    bits = [pattern & 0xFFFF for pattern in rounded.view(torch.int16).tolist()]
    return {"bf16_exact": 1, "bf16_values": bits * 2 if element.bits == 4 else bits[:32]}


def _scale_tables(fmt: BlockFormat, tensor_inv: Tensor | None) -> dict[str, Any]:
    """How the stored scales of one tensor become factors; a second level of the tensor is worked in."""
    result: dict[str, Any] = {"multiplier": fmt.rule.multiplier, "tensor_inv": 0.0, "scale_values": []}
    if fmt.scale.bits <= 8:
        codes = torch.arange(2**fmt.scale.bits, dtype=torch.uint8)
        factors = scale_factor(codes, fmt, tensor_inv)
        if fmt.has_zero_code:
            factors[0] = 0.0  # scale code 0 means that the whole block is zero (arXiv 2510.14557)
        is_shift = fmt.scale == E8M0 and fmt.rule.multiplier == 1.0
        kind = ScaleKind.POWER_OF_TWO if is_shift else ScaleKind.TABLE
        return {**result, "scale_kind": kind, "scale_values": factors.tolist()}
    kinds = {FP16: ScaleKind.FLOAT16, BF16: ScaleKind.BFLOAT16}
    result["scale_kind"] = kinds.get(fmt.scale, ScaleKind.FLOAT32)
    if tensor_inv is not None:
        result["tensor_inv"] = float(tensor_inv)
    return result


def _sparse_table(fmt: BlockFormat, parts: Mapping[str, Tensor], kept: list[Tensor]) -> dict[str, Any]:
    if fmt.sparse is None:
        return {"sparse_offsets": 0, "sparse_columns": 0, "sparse_values": 0, "sparse_wide": 0}
    stored = parts["sparse_values"]
    if fmt.sparse.element is SparseElement.FP8:
        values = decode(stored, E4M3) * parts["sparse_scale"]
    else:
        values = stored.to(torch.float32)
    kept.append(values)
    return {
        "sparse_offsets": parts["sparse_offsets"].data_ptr(),
        "sparse_columns": parts["sparse_columns"].data_ptr(),
        "sparse_values": values.data_ptr(),
        "sparse_wide": int(parts["sparse_columns"].dtype == torch.int32),
    }
