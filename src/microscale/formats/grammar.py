"""The spec grammar: any format as one word, parsed and printed back without loss.

::

    spec    := (NAME | element "/" block ":" scale) (":" option)* [sparse]
             | "pair(" spec "," spec "," percent ")" [sparse]
             | "segments(" spec "*" COLUMNS ("," spec "*" COLUMNS)* ")"
    element := eXmY | ueXmY | intN | uintN | fp16 | bf16, with suffixes -fn -ieee -none -bBIAS | -fFRACTION -full
    block   := SIZE | ROWSxCOLS | "channel" | "tensor"
    scale   := eXm0 | eXmY | ueXmY | fp16 | bf16 | fp32, optionally "+fp32" for a second scale per tensor
    option  := rule | rounding | policy | "plus" | "plusplus" | asym | sub
    rule    := floor | ceil | rceil | even | threshold(T) | prescale(P) | std(C) | mse(LO,HI) | percentile(P)
             | amax | minmax
    rounding:= nearest_even | nearest_away | toward_zero | stochastic(SEED)
    policy  := saturate | nonfinite | nan_poison | nan_raise | inf_nan | inf_saturate
    asym    := asym | asym(int) | asym(fp8) | asym(fp16)
    sub     := sub(SIZE,BITS,pow2) | sub(SIZE,BITS,linear)
    sparse  := "+sparse" PERCENT "%:" (fp8 | fp16)

Examples: ``e3m2/32:e8m0:rceil``, ``e2m1/16:e4m3+fp32``, ``int3/64:fp16:asym``, ``mxfp4:even``,
``mxfp4+sparse0.5%:fp8``. Defaults where a word is left out: see :func:`default_rule`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from microscale.errors import FormatError, FormatSpecError, check_kind, counted, nearest
from microscale.formats.block import (
    BlockFormat,
    Extension,
    PairFormat,
    SparseElement,
    SparseTable,
    SubScale,
    SubScaleKind,
    ZeroPoint,
)
from microscale.formats.elements import Element, FloatElement, IntElement, uint_element
from microscale.formats.lists import split_outside
from microscale.formats.policies import InfPolicy, NaNPolicy, Overflow, Rounding
from microscale.formats.rules import DEFAULT_ARGUMENTS, DEFAULT_MSE_FACTORS, RuleKind, ScaleRule
from microscale.formats.segmented import Format, Segment, SegmentedFormat
from microscale.formats.spec_words import (
    SCALE_REMEDY,
    SpecProblem,
    parse_block,
    parse_element,
    parse_number,
    parse_scale,
)

_CALL = re.compile(r"([a-z_]+)(?:\(([^()]*)\))?$")
_SPARSE = re.compile(r"\+sparse([0-9.eE+-]+)%:([a-z0-9]+)$")

_OPTION_REMEDY = (
    "possible options: "
    + ", ".join(kind.value for kind in RuleKind)
    + "; nearest_even, nearest_away, toward_zero, stochastic(seed); saturate, nonfinite, nan_poison, nan_raise,"
    " inf_nan, inf_saturate; plus, plusplus, asym, asym(fp8), asym(fp16), sub(size,bits,pow2|linear)"
)


def default_rule(
    element: Element, scale: FloatElement, *, extension: Extension, zero_point: ZeroPoint | None
) -> ScaleRule:
    """Return the rule of a spec that names none.

    minmax with a zero point; amax for float scales; over a power of two: floor for MX+ and MX++ and for floats
    of up to 6 bits, rceil for 8-bit floats and for integers.
    """
    if zero_point is not None:
        return ScaleRule.MINMAX
    if not scale.is_power_of_two:
        return ScaleRule.AMAX
    if extension is not Extension.NONE:
        return ScaleRule.FLOOR
    return ScaleRule.RCEIL if isinstance(element, IntElement) or element.bits >= 8 else ScaleRule.FLOOR


def parse_spec(spec: str, names: Mapping[str, Format]) -> Format:
    """Parse a spec; ``names`` are the known names.

    Raises:
        FormatSpecError: with a pointer to the word that is wrong and the list of what is possible.
    """
    text = spec.strip()
    try:
        return _parse(text, 0, names)
    except SpecProblem as problem:
        raise FormatSpecError(text, problem.offset, problem.text, problem.remedy) from None


def _parse(text: str, start: int, names: Mapping[str, Format]) -> Format:
    if not text:
        raise SpecProblem(start, "empty format", _names_remedy(names))
    if text.startswith("segments("):
        return _parse_segments(text, start, names)
    sparse: SparseTable | None = None
    body = text
    at = text.rfind("+sparse")
    if at >= 0 and ")" not in text[at:]:
        sparse = _parse_sparse(text[at:], start + at)
        body = text[:at]
    result = _parse_pair(body, start, names) if body.startswith("pair(") else _parse_block_format(body, start, names)
    if sparse is None or isinstance(result, SegmentedFormat):
        return result
    return dataclasses.replace(result, sparse=sparse)


def _parse_sparse(text: str, start: int) -> SparseTable:
    match = _SPARSE.match(text)
    remedy = "a sparse table reads +sparsePERCENT%:fp8 or +sparsePERCENT%:fp16, e.g. +sparse0.5%:fp8"
    if not match or match[2] not in ("fp8", "fp16"):
        raise SpecProblem(start, f"cannot read {text!r}", remedy)
    try:
        return SparseTable(percent=parse_number(match[1], start + 7), element=SparseElement(match[2]))
    except FormatError as error:
        raise SpecProblem(start + 7, str(error), remedy) from None


def _parse_pair(text: str, start: int, names: Mapping[str, Format]) -> PairFormat:
    remedy = "a pair reads pair(LOW,HIGH,PERCENT%), e.g. pair(int2/32:fp16:asym,mxfp4,50%)"
    if not text.endswith(")"):
        raise SpecProblem(start + len(text), "the pair is not closed with ')'", remedy)
    pieces = _pieces(text[5:-1], ",", start + 5)
    if len(pieces) != 3 or not pieces[2][1].endswith("%"):
        raise SpecProblem(
            start + 5, f"a pair has two formats and a percentage, got {counted(len(pieces), 'part')}", remedy
        )
    parts: list[BlockFormat] = []
    for offset, piece in pieces[:2]:
        part = _parse(piece, offset, names)
        if not isinstance(part, BlockFormat):
            raise SpecProblem(offset, "a pair inside a pair", remedy)
        parts.append(part)
    percent = parse_number(pieces[2][1][:-1], pieces[2][0])
    try:
        return PairFormat(low=parts[0], high=parts[1], high_percent=percent)
    except FormatError as error:
        raise SpecProblem(start, str(error), remedy) from None


def _parse_segments(text: str, start: int, names: Mapping[str, Format]) -> SegmentedFormat:
    remedy = "segments read segments(FORMAT*COLUMNS,...), e.g. segments(mxfp4*384,mxfp6_e2m3*64,mxfp8*64)"
    if not text.endswith(")"):
        raise SpecProblem(start + len(text), "the segments are not closed with ')'", remedy)
    segments: list[Segment] = []
    for offset, piece in _pieces(text[9:-1], ",", start + 9):
        word, _, cols = piece.rpartition("*")
        if not word or not cols.isdecimal() or int(cols) < 1:
            raise SpecProblem(offset, f"{piece!r} is no format with its number of columns", remedy)
        part = _parse(word, offset, names)
        if not isinstance(part, BlockFormat):
            raise SpecProblem(offset, "a segment has blocks of one format", remedy)
        segments.append(Segment(format=part, cols=int(cols)))
    try:
        return SegmentedFormat(segments=tuple(segments))
    except FormatError as error:
        raise SpecProblem(start, str(error), remedy) from None


def _parse_block_format(text: str, start: int, names: Mapping[str, Format]) -> Format:
    pieces = _pieces(text, ":", start)
    head_start, head = pieces[0]
    fields: dict[str, Any]
    if "/" in head:
        element_word, _, block_word = head.partition("/")
        if len(pieces) < 2:
            raise SpecProblem(start + len(text), "the scale is missing", f"write ELEMENT/BLOCK:SCALE; {SCALE_REMEDY}")
        fields = {
            "element": parse_element(element_word, head_start),
            "block": parse_block(block_word, head_start + len(element_word) + 1),
            **parse_scale(pieces[1][1], pieces[1][0]),
        }
        options = pieces[2:]
    else:
        named = names.get(head)
        if named is None:
            raise SpecProblem(head_start, f"unknown format {head!r}{nearest(head, names)}", _names_remedy(names))
        options = pieces[1:]
        if not options:
            return named
        if not isinstance(named, BlockFormat):
            raise SpecProblem(
                options[0][0], f"{head} is a pair and takes no options", "write the pair out: pair(LOW,HIGH,PERCENT%)"
            )
        fields = {f.name: getattr(named, f.name) for f in dataclasses.fields(named)}
        extends = {"plus", "plusplus"} & {word for _, word in options}
        if extends and named.extension is Extension.NONE:
            del fields["rule"]  # the named rule was for the plain format; floor follows from the extension
    for offset, word in options:
        fields.update(_parse_option(word, offset, fields))
    return _build(fields, start)


def _build(fields: dict[str, Any], start: int) -> BlockFormat:
    zero_point = fields.get("zero_point")
    element = fields["element"]
    if zero_point is not None and isinstance(element, IntElement) and element.signed:
        fields["element"] = uint_element(element.bits)
    extension = fields.get("extension", Extension.NONE)
    if "rule" not in fields:
        fields["rule"] = default_rule(fields["element"], fields["scale"], extension=extension, zero_point=zero_point)
    if fields["scale"].nan_code is None and "nan_policy" not in fields:
        fields["nan_policy"] = NaNPolicy.RAISE
    try:
        return BlockFormat(**fields)
    except FormatError as error:
        raise SpecProblem(
            start, str(error), "see `microscale formats` and docs/reference/formats.md for what goes together"
        ) from None


_SIMPLE_OPTIONS: dict[str, dict[str, Any]] = {
    **{rounding.value: {"rounding": rounding, "seed": 0} for rounding in Rounding},
    **{policy.value: {"overflow": policy} for policy in Overflow},
    **{policy.value: {"nan_policy": policy} for policy in NaNPolicy},
    **{policy.value: {"inf_policy": policy} for policy in InfPolicy},
    "plus": {"extension": Extension.PLUS},
    "plusplus": {"extension": Extension.PLUSPLUS},
    "asym": {"zero_point": ZeroPoint.INT},
}


def _parse_option(word: str, start: int, fields: dict[str, Any]) -> dict[str, Any]:
    match = _CALL.match(word)
    if not match:
        raise SpecProblem(start, f"cannot read option {word!r}", _OPTION_REMEDY)
    name, arguments = match[1], match[2]
    parsers: dict[str, Callable[[str, int], dict[str, Any]]] = {
        "asym": _parse_asym,
        "sub": _parse_sub,
        "stochastic": _parse_stochastic,
    }
    if arguments is not None and name in parsers:
        return parsers[name](arguments, start)
    if arguments is None and name in _SIMPLE_OPTIONS:
        return _SIMPLE_OPTIONS[name]
    if name in {kind.value for kind in RuleKind}:
        return {"rule": _parse_rule(RuleKind(name), arguments, start, fields["scale"])}
    raise SpecProblem(start, f"unknown option {word!r}", _OPTION_REMEDY)


def _parse_rule(kind: RuleKind, arguments: str | None, start: int, scale: FloatElement) -> ScaleRule:
    if arguments is None:
        values = DEFAULT_ARGUMENTS.get(kind, ())
        if kind is RuleKind.MSE and not scale.is_power_of_two:
            values = DEFAULT_MSE_FACTORS
    else:
        values = tuple(parse_number(piece, start) for piece in arguments.split(","))
    try:
        return ScaleRule(kind, values)
    except FormatError as error:
        raise SpecProblem(
            start, str(error), "e.g. threshold(7.25), prescale(0.75), mse(-1,1), percentile(99.9)"
        ) from None


def parse_scale_rule(word: str, scale: FloatElement) -> ScaleRule:
    """Parse a scale rule by itself, e.g. ``threshold(7.25)``, for a format with this scale.

    Raises:
        FormatSpecError: an unknown rule, or arguments that it does not take.
    """
    check_kind(word, str, "a scale rule", "a text such as 'floor' or 'mse(-1,1)'", error=FormatError)
    check_kind(scale, FloatElement, "the scale of a rule", "a FloatElement", error=FormatError)
    name, _, rest = word.strip().partition("(")
    if name not in {kind.value for kind in RuleKind} or (rest and not rest.endswith(")")):
        raise FormatSpecError(word, 0, f"unknown scale rule {name!r}", _OPTION_REMEDY)
    try:
        return _parse_rule(RuleKind(name), rest[:-1] if rest else None, 0, scale)
    except SpecProblem as problem:
        raise FormatSpecError(word, problem.offset, problem.text, problem.remedy) from None


def _parse_asym(arguments: str, start: int) -> dict[str, Any]:
    if arguments not in {kind.value for kind in ZeroPoint}:
        raise SpecProblem(
            start, f"unknown zero point {arguments!r}", "possible: asym, asym(int), asym(fp8), asym(fp16)"
        )
    return {"zero_point": ZeroPoint(arguments)}


def _parse_sub(arguments: str, start: int) -> dict[str, Any]:
    remedy = "a sub-group scale reads sub(SIZE,BITS,pow2) or sub(SIZE,BITS,linear), e.g. sub(8,2,linear)"
    match = re.fullmatch(r"(\d+),(\d+),(pow2|linear)", arguments.replace(" ", ""))
    if not match:
        raise SpecProblem(start, f"cannot read sub({arguments})", remedy)
    try:
        return {"sub_scale": SubScale(size=int(match[1]), bits=int(match[2]), kind=SubScaleKind(match[3]))}
    except FormatError as error:
        raise SpecProblem(start, str(error), remedy) from None


def _parse_stochastic(arguments: str, start: int) -> dict[str, Any]:
    if not re.fullmatch(r"\d+", arguments):
        raise SpecProblem(start, f"the seed must be a whole number, got {arguments!r}", "e.g. stochastic(42)")
    return {"rounding": Rounding.STOCHASTIC, "seed": int(arguments)}


def _pieces(text: str, separator: str, start: int) -> list[tuple[int, str]]:
    return [(start + offset, piece) for offset, piece in split_outside(text, separator)]


def _names_remedy(names: Mapping[str, Format]) -> str:
    return "known names: " + ", ".join(names) + "\nor write one: ELEMENT/BLOCK:SCALE[:OPTION…], e.g. e3m2/32:e8m0:rceil"
