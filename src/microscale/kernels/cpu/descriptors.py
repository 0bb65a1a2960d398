"""From a format record to the plain data that the C++ kernels read (``csrc/cpu/format.h``), and why there is none.

This is the only bridge: :func:`descriptor` serves quantize, dequantize, the fused operations, and linear for its
weights and its activations; ``tests/kernels/test_bridge.py`` compares it with what the extension reads.

Every number a kernel needs (fields of the element, values of all codes, the scale rule in integers) is taken from
the record here, so that nothing about a format is stated in C++. The structs are the twins of those in format.h;
all fields are four bytes wide.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from fractions import Fraction

import torch

from microscale.formats import (
    BlockFormat,
    ChannelBlock,
    Draw,
    Element,
    FloatElement,
    InfPolicy,
    IntElement,
    Overflow,
    RuleKind,
    TensorBlock,
    TileBlock,
    VectorBlock,
    ZeroPoint,
)
from microscale.formats.block import PLUSPLUS_DELTA_BITS
from microscale.formats.codec import PLAIN_SCALE_CODES, decode_zero_point, zero_point_element
from microscale.formats.rules import MSE_FLOAT_STEPS, mse_factors
from microscale.kernels.cpu import enums
from microscale.kernels.cpu.enums import Decoding, Rule, Statistic, Storage
from microscale.kernels.cpu.products import ProductsStruct, fields, products

MAX_BLOCK = 1 << 20
NEVER = 1 << 23
"""A mantissa field that no float32 exceeds."""
FARTHEST = 1 << 21
"""An offset that takes every exponent, that of 0 included, past the end of any scale."""


_STORAGES = {"fp16": Storage.F16, "bf16": Storage.BF16, "fp32": Storage.F32}
_I, _U, _F = ctypes.c_int32, ctypes.c_uint32, ctypes.c_float


class NumberStruct(ctypes.Structure):
    """``ms::Number``."""

    _fields_ = [
        *fields(_I, "is_integer", "bits", "is_signed", "has_subnormals", "mantissa_bits", "bias", "magnitude_bits"),
        *fields(_I, "max_code", "min_code", "nan_code", "overflow_code", "special_base", "max_exponent"),
        *fields(_I, "can_anchor", "is_plain"),
        *fields(_F, "max_value", "min_normal", "steps_first", "steps_second", "int_scale"),
    ]


class FormatStruct(ctypes.Structure):
    """``ms::Format``."""

    _fields_ = [
        *fields(NumberStruct, "element", "scale", "zero"),
        ("rounding", _I),
        ("noise_key", _U),
        *fields(_I, "inf_saturates", "storage"),
        ("nan_scale", _U),
        *fields(_I, "block_size", "statistic", "percentile_rank", "rule", "exponent_base", "mantissa_limit"),
        ("deviation_factor", _U * 2),
        *fields(_I, "search_low", "search_high"),
        ("fit_factors", _F * MSE_FLOAT_STEPS),
        *fields(_I, "is_power_of_two", "has_exact_inverse"),
        *fields(_F, "divisor", "multiplier"),
        *fields(_I, "has_tensor_scale", "tensor_by_raw"),
        *fields(_F, "tensor_numerator", "tensor_numerator_amax"),
        *fields(_I, "extension", "index_bits", "delta_shift", "delta_limit"),
        ("plain_limit", _F),
        *fields(_I, "zero_point", "zero_is_half"),
        ("zero_limit", _F),
        ("decoding", _I),
        *fields(_F * 256, "element_values", "scale_values", "scale_inverses", "zero_values"),
        ("products", ProductsStruct),
    ]


def storage_refusal(fmt: BlockFormat) -> str | None:
    """Return why the kernels cannot read or write codes of a format, or None where they can."""
    if fmt.element.bits > 8:
        return f"takes elements of up to 8 bits, not {fmt.element.name}"
    if isinstance(fmt.block, TileBlock | TensorBlock):
        return "takes blocks along the last axis (a vector or a channel), not tiles or the whole tensor"
    if fmt.sub_scale is not None:
        return "takes no sub-group scales"
    if fmt.index_bits > 8:
        return f"takes index entries of up to 8 bits, not {fmt.index_bits}"
    if isinstance(fmt.block, VectorBlock) and fmt.block.size > MAX_BLOCK:
        return f"takes blocks of up to {MAX_BLOCK} elements, not {fmt.block.size}"
    return None


def encode_refusal(fmt: BlockFormat) -> str | None:
    """Return why the kernels cannot quantize to a format bit for bit, or None where they can."""
    if fmt.rule.kind is RuleKind.PERCENTILE and isinstance(fmt.block, ChannelBlock):
        return f"leaves rule {fmt.rule} of whole rows to the reference"
    return storage_refusal(fmt)


@functools.lru_cache(maxsize=512)
def descriptor(fmt: BlockFormat) -> FormatStruct:
    """Return the data of a format without :func:`storage_refusal`; the same object at every call."""
    result = FormatStruct(
        element=_number(fmt.element, fmt.overflow, is_code=True),
        scale=_number(fmt.scale, Overflow.SATURATE, is_code=False),
        rounding=enums.Rounding[fmt.rounding.name],
        noise_key=fmt.default_draw.key,
        inf_saturates=fmt.inf_policy is InfPolicy.SATURATE,
        storage=_STORAGES.get(fmt.scale.name, Storage.CODE8) if fmt.scale.bits > 8 else Storage.CODE8,
        nan_scale=fmt.scale.nan_code or 0,
        block_size=fmt.block.size if isinstance(fmt.block, VectorBlock) else 0,
        is_power_of_two=fmt.scale.is_power_of_two,
        multiplier=fmt.rule.multiplier,
        has_tensor_scale=fmt.tensor_scale is not None,
        extension=enums.Extension[fmt.extension.name],
        index_bits=fmt.index_bits,
        delta_limit=2**PLUSPLUS_DELTA_BITS - 1,
        decoding=_decoding(fmt.element),
        products=products(fmt),
    )
    _fill_rule(result, fmt)
    _fill_tables(result, fmt)
    if fmt.is_extended:
        result.delta_shift = fmt.place_bits
        result.plain_limit = 0 if fmt.has_zero_code else fmt.scale.value(PLAIN_SCALE_CODES)
    if fmt.zero_point is not None:
        _fill_zero_point(result, fmt)
    return result


def drawn_descriptor(fmt: BlockFormat, draw: Draw) -> FormatStruct:
    """Return the data of a format whose stochastic rounding draws from ``draw``; a new object, to be kept meanwhile."""
    result = FormatStruct.from_buffer_copy(descriptor(fmt))
    result.noise_key = draw.key
    return result


def _number(element: Element, overflow: Overflow, *, is_code: bool) -> NumberStruct:
    if isinstance(element, IntElement):
        return NumberStruct(
            is_integer=1,
            bits=element.bits,
            is_signed=element.signed,
            max_code=element.max_code,
            min_code=element.min_code,
            max_exponent=element.max_exponent,
            can_anchor=1,
            max_value=element.max_value,
            int_scale=2.0**element.fraction_bits,
        )
    steps_log2 = -element.min_exponent
    special = element.inf_code if element.inf_code is not None else element.nan_code
    saturates = overflow is Overflow.SATURATE or special is None
    return NumberStruct(
        bits=element.bits,
        is_signed=element.signed,
        has_subnormals=element.subnormals,
        mantissa_bits=element.mantissa_bits,
        bias=element.bias,
        magnitude_bits=element.exponent_bits + element.mantissa_bits,
        max_code=element.max_code,
        nan_code=element.nan_code or 0,
        overflow_code=element.max_code if saturates else special,
        special_base=element.max_code if element.inf_code is None else element.inf_code,
        max_exponent=element.max_exponent,
        can_anchor=is_code and saturates and _has_anchor(element),
        is_plain=element.subnormals and element.bias <= 127 and element.mantissa_bits < 23,
        max_value=element.max_value,
        min_normal=element.min_normal,
        steps_first=2.0**steps_log2 if steps_log2 <= 127 else 2.0**64,
        steps_second=1.0 if steps_log2 <= 127 else 2.0 ** (steps_log2 - 64),
        int_scale=1,
    )


def _has_anchor(element: FloatElement) -> bool:
    """Whether 2^(e + 23 - M) is a normal float32 for every exponent e, so that adding it rounds to nearest even."""
    lowest, highest = 1 - element.bias, element.max_exponent + 23 - element.mantissa_bits
    return element.signed and element.subnormals and element.mantissa_bits >= 1 and lowest >= -126 and highest <= 127


def _decoding(element: Element) -> Decoding:
    if element.bits <= 4:
        return Decoding.TABLE16
    if isinstance(element, IntElement):
        return Decoding.INTEGER
    lowest_field = 127 - element.bias
    is_normal = lowest_field >= 1 and lowest_field + 2**element.exponent_bits - 1 <= 254
    return Decoding.SMALL_FLOAT if is_normal else Decoding.TABLE


def _fill_rule(result: FormatStruct, fmt: BlockFormat) -> None:
    """Write the scale rule: exponents and a limit of the mantissa field, or a divisor."""
    rule, element = fmt.rule, fmt.element
    result.mantissa_limit, result.exponent_base = NEVER, -element.max_exponent
    result.divisor = rule.arguments[0] if rule.kind is RuleKind.THRESHOLD else element.max_value
    if rule.kind is RuleKind.PERCENTILE and isinstance(fmt.block, VectorBlock):
        result.statistic = Statistic.PERCENTILE
        result.percentile_rank = max(1, math.ceil(Fraction(repr(rule.arguments[0])) * fmt.block.size / 100))
    if rule.kind is RuleKind.STD:
        result.statistic = Statistic.DEVIATION
        words = struct.unpack("<II", struct.pack("<d", rule.arguments[0] / element.max_value))
        result.deviation_factor[0], result.deviation_factor[1] = words
    if not fmt.scale.is_power_of_two:
        result.rule = Rule.UP if rule.kind in (RuleKind.RCEIL, RuleKind.PERCENTILE) else Rule.NEAREST
        result.tensor_by_raw = rule.kind in (RuleKind.STD, RuleKind.PERCENTILE, RuleKind.MINMAX)
        if rule.kind is RuleKind.MSE:
            result.rule = Rule.FIT
            for step, factor in enumerate(mse_factors(rule)):
                result.fit_factors[step] = factor
        divisor = rule.arguments[0] if rule.kind is RuleKind.THRESHOLD else element.max_value
        result.tensor_numerator_amax = fmt.scale.max_value * divisor if fmt.tensor_scale is not None else 1
        by_raw = fmt.scale.max_value if fmt.tensor_scale is not None else 1
        result.tensor_numerator = by_raw if result.tensor_by_raw else result.tensor_numerator_amax
        return
    match rule.kind:
        case RuleKind.CEIL:
            result.mantissa_limit = 0
        case RuleKind.EVEN:
            bits = int(rule.arguments[0]) if rule.arguments else element.mantissa_bits
            result.mantissa_limit = NEVER - 2 ** (22 - bits) - 1 if bits <= 22 else NEVER
        case RuleKind.RCEIL | RuleKind.PERCENTILE | RuleKind.THRESHOLD:
            divisor = rule.arguments[0] if rule.kind is RuleKind.THRESHOLD else element.max_value
            mantissa, exponent = math.frexp(divisor)
            result.exponent_base = 1 - exponent
            result.mantissa_limit = math.floor(mantissa * 2**24) - 2**23
        case RuleKind.MSE:
            result.rule = Rule.SEARCH
            low, high = (max(-FARTHEST, min(FARTHEST, int(argument))) for argument in rule.arguments)
            result.search_low, result.search_high = low, high
        case _:
            pass


def _fill_tables(result: FormatStruct, fmt: BlockFormat) -> None:
    for code in range(2**fmt.element.bits):
        result.element_values[code] = fmt.element.value(code)
    scale = fmt.scale
    if scale.bits > 8:
        return
    for code in range(2**scale.bits):
        result.scale_values[code] = scale.value(code)
    result.has_exact_inverse = scale.is_power_of_two and fmt.rule.multiplier == 1 and scale.bias <= 127
    if result.has_exact_inverse:
        for code in range(scale.max_code + 1):
            result.scale_inverses[code] = 2.0 ** (scale.bias - code)


def _fill_zero_point(result: FormatStruct, fmt: BlockFormat) -> None:
    result.statistic = Statistic.RANGE
    result.divisor = fmt.element.max_code
    if fmt.zero_point is not ZeroPoint.FP16:
        result.zero_values[:] = decode_zero_point(torch.arange(256, dtype=torch.uint8), fmt).tolist()
    if fmt.zero_point is ZeroPoint.INT:
        result.zero_point = enums.ZeroPoint.INTEGER
        result.zero = NumberStruct(is_integer=1, bits=fmt.zero_point_bits)
        return
    number = zero_point_element(fmt)
    result.zero_point = enums.ZeroPoint.NUMBER
    result.zero = _number(number, Overflow.SATURATE, is_code=False)
    result.zero_is_half = fmt.zero_point is ZeroPoint.FP16
    result.zero_limit = number.max_value
