"""The words of a spec: element, block and scale, each parsed by itself.

:mod:`microscale.formats.grammar` puts them together and knows the form of a whole spec.
"""

from __future__ import annotations

import re
from typing import Any

from microscale.errors import FormatError
from microscale.formats.block_shape import Block, ChannelBlock, TensorBlock, TileBlock, VectorBlock
from microscale.formats.elements import (
    BF16,
    FP16,
    FP32,
    Element,
    FloatElement,
    IntElement,
    SpecialValues,
    float_element,
    int_element,
    power_of_two_scale,
    uint_element,
)

_WIDE = {"fp16": FP16, "bf16": BF16, "fp32": FP32}
_FLOAT_WORD = re.compile(r"(u?)e(\d+)m(\d+)(?:-(fn|ieee|none))?(?:-b(-?\d+))?$")
_INT_WORD = re.compile(r"(u?)int(\d+)(?:-f(-?\d+))?(-full)?$")

_ELEMENT_REMEDY = "an element is eXmY (E 0-8, M 0-10), ueXmY, intN or uintN (2-8 bits), fp16 or bf16"
_BLOCK_REMEDY = "a block is a size (32), a tile (16x16), 'channel' or 'tensor'"
SCALE_REMEDY = "a scale is e8m0, eXm0, eXmY, ueXmY, fp16, bf16 or fp32, with +fp32 for a second one per tensor"


class SpecProblem(Exception):
    """A parsing problem at an offset inside the piece at hand; the caller adds the spec."""

    def __init__(self, offset: int, text: str, remedy: str) -> None:
        super().__init__(text)
        self.offset, self.text, self.remedy = offset, text, remedy


def parse_element(word: str, start: int) -> Element:
    """Return the element of a word such as ``e2m1`` or ``int4``, which begins at ``start``.

    Raises:
        SpecProblem: an unknown word, or an element that does not exist.
    """
    if word in ("fp16", "bf16"):
        return _WIDE[word]
    try:
        if match := _FLOAT_WORD.match(word):
            return _float_from_match(match)
        if match := _INT_WORD.match(word):
            return _int_from_match(match)
    except FormatError as error:
        raise SpecProblem(start, str(error), _ELEMENT_REMEDY) from None
    raise SpecProblem(start, f"unknown element {word!r}", _ELEMENT_REMEDY)


def _int_from_match(match: re.Match[str]) -> IntElement:
    unsigned, bits, fraction, full = match.groups()
    if unsigned and full:
        raise FormatError("an unsigned integer has no 'full' variant")
    if unsigned:
        return uint_element(int(bits), fraction_bits=int(fraction or 0))
    return int_element(int(bits), fraction_bits=int(fraction) if fraction else None, symmetric=not full)


def _float_from_match(match: re.Match[str]) -> FloatElement:
    unsigned, exponent, mantissa, specials, bias = match.groups()
    return float_element(
        int(exponent),
        int(mantissa),
        bias=int(bias) if bias else None,
        specials=SpecialValues(specials) if specials else None,
        signed=not unsigned,
    )


def parse_block(word: str, start: int) -> Block:
    """Return the block of ``32``, ``16x16``, ``channel`` or ``tensor``.

    Raises:
        SpecProblem: another word, or a size that does not exist.
    """
    if word == "channel":
        return ChannelBlock()
    if word == "tensor":
        return TensorBlock()
    try:
        if re.fullmatch(r"\d+", word):
            return VectorBlock(int(word))
        if match := re.fullmatch(r"(\d+)x(\d+)", word):
            return TileBlock(int(match[1]), int(match[2]))
    except FormatError as error:
        raise SpecProblem(start, str(error), _BLOCK_REMEDY) from None
    raise SpecProblem(start, f"unknown block {word!r}", _BLOCK_REMEDY)


def parse_scale(word: str, start: int) -> dict[str, Any]:
    """Return the fields of a block format that a scale such as ``e8m0`` or ``e4m3+fp32`` stands for.

    Raises:
        SpecProblem: an unknown word, or a scale that does not exist.
    """
    first, plus, second = word.partition("+")
    if plus and second != "fp32":
        raise SpecProblem(start + len(first) + 1, f"unknown second scale {second!r}", SCALE_REMEDY)
    fields: dict[str, Any] = {"tensor_scale": FP32} if plus else {}
    if first in _WIDE:
        return {"scale": _WIDE[first], **fields}
    match = _FLOAT_WORD.match(first)
    if not match:
        raise SpecProblem(start, f"unknown scale {first!r}", SCALE_REMEDY)
    try:
        if int(match[3]) == 0 and not match[1] and match[4] is None:
            bias = int(match[5]) if match[5] else None
            return {"scale": power_of_two_scale(int(match[2]), bias=bias), **fields}
        scale = _float_from_match(match)
    except FormatError as error:
        raise SpecProblem(start, str(error), SCALE_REMEDY) from None
    return {"scale": scale, **fields}


def parse_number(text: str, start: int) -> float:
    """Return a number.

    Raises:
        SpecProblem: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise SpecProblem(start, f"{text!r} is not a number", "write a decimal number, e.g. 7.25") from None
