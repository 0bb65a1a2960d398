"""Formats in words: what ``microscale formats`` and ``microscale formats NAME`` show.

Every number comes from the format record; only the sentences are written here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from microscale.formats import (
    NAMED_FORMATS,
    Block,
    BlockFormat,
    ChannelBlock,
    Element,
    Extension,
    Format,
    InfPolicy,
    IntElement,
    NaNPolicy,
    Overflow,
    PairFormat,
    Rounding,
    RuleKind,
    SegmentedFormat,
    SpecialValues,
    SubScale,
    SubScaleKind,
    TensorBlock,
    TileBlock,
    VectorBlock,
    ZeroPoint,
    format_name,
    parse_format,
    spec_text,
)
from microscale.formats.block import PLUSPLUS_DELTA_BITS
from microscale.formats.rules import number_word
from microscale.formats.spec_text import block_text, scale_text

_POWER_OF_TWO_RULES = {
    RuleKind.FLOOR: "2^(floor(log2 amax) - e_max); scaled numbers past the largest value saturate",
    RuleKind.CEIL: "2^(ceil(log2 amax) - e_max); nothing saturates",
    RuleKind.RCEIL: "2^ceil(log2(amax / max)); nothing saturates",
    RuleKind.EVEN: "2^(floor(log2 r) - e_max), r = amax rounded half up to {0} mantissa bits",
    RuleKind.THRESHOLD: "2^ceil(log2(amax / {0})); scaled numbers past the largest value saturate",
    RuleKind.PRESCALE: "2^(floor(log2 amax) - e_max) / {0}",
    RuleKind.STD: "2^floor(log2({0} * standard deviation / max))",
    RuleKind.MSE: "2^(floor(log2 amax) - e_max + k), k from {0} to {1} with the least squared error",
    RuleKind.PERCENTILE: "2^ceil(log2(q / max)), q = percentile {0} of |x| (nearest rank)",
}
_FLOAT_RULES = {
    RuleKind.AMAX: "amax / max, rounded to the nearest scale",
    RuleKind.RCEIL: "amax / max, rounded up to a scale",
    RuleKind.THRESHOLD: "amax / {0}, rounded to the nearest scale",
    RuleKind.STD: "{0} * standard deviation / max, rounded to the nearest scale",
    RuleKind.MSE: "least-squares fits started from amax / max times {0} to {1}",
    RuleKind.PERCENTILE: "q / max rounded up to a scale, q = percentile {0} of |x| (nearest rank)",
    RuleKind.MINMAX: "(max - min) / (2^bits - 1), rounded to the nearest scale",
}
_ROUNDINGS = {
    Rounding.NEAREST_EVEN: "to nearest, ties to the even code",
    Rounding.NEAREST_AWAY: "to nearest, ties away from zero",
    Rounding.TOWARD_ZERO: "toward zero",
}
_NAN = {
    NaNPolicy.POISON_BLOCK: "the whole block becomes NaN",
    NaNPolicy.RAISE: "NonFiniteError",
}
_INF = {
    InfPolicy.AS_NAN: "as NaN",
    InfPolicy.SATURATE: "as the largest float32",
}
_ZERO_POINTS = {
    ZeroPoint.INT: "an integer of {0} bits; the range always includes 0",
    ZeroPoint.FP8: "an E4M3 number",
    ZeroPoint.FP16: "an fp16 number",
}
_SPECIALS = {
    SpecialValues.IEEE: "Inf and NaN",
    SpecialValues.FN: "one NaN code, no Inf",
    SpecialValues.NONE: "neither Inf nor NaN",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRow:
    """One line of ``microscale formats``."""

    name: str
    title: str
    bits_per_value: float
    largest: str
    block: str
    scale: str
    rule: str
    summary: str


def formats_table_rows() -> list[FormatRow]:
    """Return one row for each named format, in the registry's order."""
    return [
        FormatRow(
            name=named.name,
            title=named.title,
            bits_per_value=named.format.bits_per_value(),
            largest=_both(named.format, lambda part: number_word(part.element.max_value)),
            block=_both(named.format, lambda part: block_text(part.block)),
            scale=_both(named.format, _scale_word),
            rule=_both(named.format, _rule_word),
            summary=named.summary,
        )
        for named in NAMED_FORMATS.values()
    ]


def explain_format(fmt: Format | str) -> list[tuple[str, str]]:
    """Return a format as (label, text) pairs; parts that it does not have are left out.

    Raises:
        FormatSpecError: a name or spec that cannot be read.
    """
    record = parse_format(fmt)
    named = NAMED_FORMATS.get(format_name(record))
    pairs: list[tuple[str, str]] = []
    if named is not None:
        pairs += [("name", f"{named.name} ({named.title})"), ("what it is", named.summary)]
    pairs.append(("bits per value", number_word(round(record.bits_per_value(), 6))))
    if isinstance(record, SegmentedFormat):
        pairs += [(f"columns {at.start}-{at.stop - 1}", format_name(part)) for part, at in record.places()]
    else:
        pairs += _pair_pairs(record) if isinstance(record, PairFormat) else _block_pairs(record)
    if record.sparse is not None:
        kept = f"the {number_word(record.sparse.percent)} % largest of the tensor, in {record.sparse.element.value}"
        pairs.append(("sparse table", kept))
    if named is not None:
        pairs.append(("source", named.source))
    pairs.append(("spec", spec_text(record)))
    return pairs


def _pair_pairs(fmt: PairFormat) -> list[tuple[str, str]]:
    pairs = [("choice", f"a bitmap; the {number_word(fmt.high_percent)} % of blocks that gain most are wide")]
    for label, part in (("narrow", fmt.low), ("wide", fmt.high)):
        pairs += [(f"{label} {name}", text) for name, text in _block_pairs(part) if name != "block"]
    return [("block", _block_sentence(fmt.block)), *pairs]


def _block_pairs(fmt: BlockFormat) -> list[tuple[str, str]]:
    pairs = [
        ("element", _element_sentence(fmt.element)),
        ("block", _block_sentence(fmt.block)),
        ("scale", _scale_sentence(fmt)),
        ("scale rule", f"{fmt.rule}: {_rule_sentence(fmt)}"),
    ]
    if fmt.sub_scale is not None:
        pairs.append(("sub-group scale", _sub_scale_sentence(fmt.sub_scale)))
    if fmt.zero_point is not None:
        pairs.append(("zero point", _ZERO_POINTS[fmt.zero_point].format(fmt.element.bits)))
    if fmt.is_extended:
        pairs.append(("largest element", _extension_sentence(fmt)))
    stochastic = f"stochastic, seed {fmt.seed}"
    pairs += [
        ("rounding", _ROUNDINGS.get(fmt.rounding, stochastic)),
        ("overflow", "saturates" if fmt.overflow is Overflow.SATURATE else "becomes Inf or NaN"),
        ("NaN", _NAN[fmt.nan_policy]),
        ("Inf", _INF[fmt.inf_policy]),
    ]
    return pairs


def _element_sentence(element: Element) -> str:
    largest, smallest = number_word(element.max_value), _exact(element.min_value)
    if isinstance(element, IntElement):
        kind = "signed" if element.signed else "unsigned"
        fraction = f", {element.fraction_bits} of them fraction" if element.fraction_bits else ""
        lowest = number_word(element.value(element.min_code & (2**element.bits - 1)))
        return f"{element.name}: {element.bits} bits, {kind}{fraction}; {lowest} to {largest} in steps of {smallest}"
    sign = "1 sign, " if element.signed else ""
    fields = f"{sign}{element.exponent_bits} exponent, {element.mantissa_bits} mantissa; bias {element.bias}"
    limits = f"smallest {smallest}, largest {largest}"
    return f"{element.name}: {element.bits} bits ({fields}); {limits}; {_SPECIALS[element.specials]}"


def _block_sentence(block: Block) -> str:
    match block:
        case VectorBlock(size=size):
            return f"{size} consecutive elements of the last axis"
        case TileBlock(rows=rows, cols=cols):
            return f"a tile of {rows} rows and {cols} columns"
        case ChannelBlock():
            return "a whole row"
        case TensorBlock():
            return "the whole tensor"


def _scale_sentence(fmt: BlockFormat) -> str:
    scale = fmt.scale
    low, high = _exact(scale.min_value), _exact(scale.max_value)
    kind = "powers of two from" if scale.is_power_of_two else "a float: 0 or"
    text = f"{scale_text(scale)}: {scale.bits_stored} bits, {kind} {low} to {high}"
    return text if fmt.tensor_scale is None else f"{text}; one more fp32 scale for the whole tensor"


def _rule_sentence(fmt: BlockFormat) -> str:
    arguments = [number_word(argument) for argument in fmt.rule.arguments]
    if fmt.rule.kind is RuleKind.EVEN and not arguments:
        arguments = [str(fmt.element.mantissa_bits)]
    sentences = _POWER_OF_TWO_RULES if fmt.scale.is_power_of_two else _FLOAT_RULES
    return sentences[fmt.rule.kind].format(*arguments)


def _sub_scale_sentence(sub_scale: SubScale) -> str:
    is_power = sub_scale.kind is SubScaleKind.POWER_OF_TWO
    meaning = "2^-k" if is_power else f"(k + 1) / {2**sub_scale.bits}"
    return f"{sub_scale.bits} bits for each {sub_scale.size} elements; code k multiplies the block's scale by {meaning}"


def _extension_sentence(fmt: BlockFormat) -> str:
    first = number_word(2.0**fmt.element.max_exponent)
    bits = fmt.magnitude_bits
    text = (
        f"sign and {bits} fraction bits, {first} * (1 + f / {2**bits}); its index takes {fmt.index_bits} bits a block"
    )
    if fmt.extension is Extension.PLUS:
        return text
    return f"{text}, {PLUSPLUS_DELTA_BITS} of which say how much smaller (2^0 to 2^-7) the scale of the others is"


def _both(fmt: Format, text: Callable[[BlockFormat], str]) -> str:
    """Return the text of a block format, or of the formats of a pair or of segments where they differ."""
    if isinstance(fmt, BlockFormat):
        return text(fmt)
    parts = (fmt.low, fmt.high) if isinstance(fmt, PairFormat) else tuple(part for part, _ in fmt.places())
    return " / ".join(dict.fromkeys(text(part) for part in parts))


def _scale_word(fmt: BlockFormat) -> str:
    return scale_text(fmt.scale) + ("+fp32" if fmt.tensor_scale is not None else "")


def _rule_word(fmt: BlockFormat) -> str:
    extension = "" if not fmt.is_extended else f" {fmt.extension.value}"
    return f"{fmt.rule}{extension}"


def _exact(value: float) -> str:
    """Print a number exactly and briefly: small and large ones as m * 2^e."""
    if value == 0 or 1e-3 <= value < 1e6:
        return number_word(value)
    mantissa, exponent = math.frexp(value)
    return f"2^{exponent - 1}" if mantissa == 0.5 else f"{number_word(mantissa * 2)} * 2^{exponent - 1}"
