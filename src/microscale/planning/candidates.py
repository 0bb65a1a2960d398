"""Candidates: what a layer may be given, as formats of weights and input activations and, if need be, a method.

Written ``WEIGHTS[/ACTIVATIONS][@METHOD]``: ``mxfp4`` rounds both, ``mxfp4/mxfp8`` gives the inputs another format,
``mxfp4/none`` leaves them, ``none`` leaves the layer as it is. A spec may hold slashes itself
(``int2/64:fp16:asym``): the longest reading of the weights that is a format is taken. ``mxfp4@micromix:bits=5.0``
cuts the layer into segments; ``micromix:bits=5.0`` alone starts from MXFP4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from microscale.algorithms.contract import FoldStep, ModelStep, RefineStep, RotationStep
from microscale.algorithms.pipeline import Method, read_method
from microscale.algorithms.registry import is_method
from microscale.errors import AllocationError, FormatError
from microscale.formats import (
    NONE,
    ActivationSpec,
    Format,
    RangeKind,
    Written,
    WrittenInputs,
    WrittenWeights,
    parse_weights_and_inputs,
    split_outside,
)

BASE = "mxfp4"
"""The format that a candidate of a method alone starts from."""
_OPTION = re.compile(r"[a-z_]+=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice for a layer; ``activations`` None means that inputs are not rounded.

    ``method`` is the candidate's own; None: that of the whole recipe. ``names_inputs``: the words said what becomes of
    the inputs, so that nothing else replaces it.
    """

    weights: WrittenWeights
    activations: WrittenInputs | None
    method: Method | None = None
    names_inputs: bool = field(default=False, compare=False)

    @property
    def is_kept(self) -> bool:
        """Whether the layer stays unquantized."""
        return self.weights.record is None

    @property
    def inputs_format(self) -> Format | None:
        """The format of the inputs, None where they are not rounded."""
        spec = None if self.activations is None else self.activations.record
        return None if spec is None else spec.format

    @property
    def meaning(self) -> tuple[object, ...]:
        """What is chosen, whatever words said it."""
        return self.weights.record, None if self.activations is None else self.activations.record, self.method

    @property
    def text(self) -> str:
        """The shortest word that parses back."""
        same = self.is_kept or str(self.activations) == str(self.weights)
        formats = str(self.weights) if same else f"{self.weights}/{self.activations or NONE}"
        if self.method is None:
            return formats
        return str(self.method) if formats == BASE else f"{formats}@{self.method}"

    def bits_per_weight(self, shape: tuple[int, int], kept_bits: float) -> float:
        """Bits of one weight of a layer [rows, cols], scales included; ``kept_bits`` where it is left alone.

        Where a method cuts segments, these are the bits of the narrowest.
        """
        fmt = self.weights.record
        return kept_bits if fmt is None else fmt.bits_per_value(*shape)


def parse_candidate(text: str) -> Candidate:
    """Return what ``WEIGHTS[/ACTIVATIONS][@METHOD]`` stands for.

    Raises:
        AllocationError: no reading as formats (the message has what the format parser says), or a method that cannot
            serve one layer alone.
        RecipeError: a method that cannot be read.
    """
    formats, method = _split_method(text.strip())
    found = _parse_formats(formats)
    if method is None:
        return found
    if found.is_kept:
        raise AllocationError(f"candidate {text.strip()!r} has a method for a layer that it leaves alone")
    asked = read_method(method)
    kinds = (FoldStep, RotationStep, ModelStep, RefineStep)
    tied = next((step for kind in kinds for step in asked.pipeline().of_kind(kind)), None)
    if tied is not None:
        raise AllocationError(
            f"candidate {text.strip()!r}: step {tied.name} changes more than one layer, so it cannot be chosen for one"
            " alone; name it with --method"
        )
    return replace(found, method=asked)


def _split_method(word: str) -> tuple[str, str | None]:
    """Return formats and method of a candidate; ``@static`` and the like belong to the formats."""
    if _is_method(word):
        return BASE, word
    for place, letter in enumerate(word):
        if letter == "@" and _is_method(word[place + 1 :]):
            return word[:place], word[place + 1 :]
    return word, None


def _is_method(text: str) -> bool:
    first = re.split(r"[:+]", text, maxsplit=1)[0].strip()
    return is_method(first)


def _parse_formats(word: str) -> Candidate:
    try:
        weights, inputs = parse_weights_and_inputs(word)
    except FormatError as error:
        raise AllocationError(f"candidate {word!r} must read WEIGHTS[/ACTIVATIONS][@METHOD]\n{error}") from None
    spec = None if inputs is None else inputs.record
    if weights.record is None:
        if spec is not None:
            raise AllocationError(f"candidate {word!r} rounds the inputs of a layer that it leaves alone")
        return Candidate(weights=weights, activations=None)
    if inputs is None:
        inputs = Written(weights.word, ActivationSpec(format=weights.record))
        return Candidate(weights=weights, activations=inputs)
    if spec is not None and spec.range is not RangeKind.DYNAMIC:
        raise AllocationError(
            f"candidate {word!r}: allocation measures inputs with dynamic ranges only, not {spec.range.value}"
        )
    return Candidate(weights=weights, activations=None if spec is None else inputs, names_inputs=True)


def parse_candidates(text: str) -> tuple[Candidate, ...]:
    """Return the candidates of a list with commas.

    Commas inside parentheses belong to a format, and an item that reads ``option=value`` to the method before it.

    Candidates that mean the same, such as ``mxfp8`` and ``mxfp8_e4m3``, are one.

    Raises:
        AllocationError: none, one word twice, or one that cannot be read.
        RecipeError: a method that cannot be read.
    """
    items = [piece.strip() for _, piece in split_outside(text.strip().removesuffix(","), ",")]
    if not all(items):
        raise AllocationError(f"formats {text!r} must be a list without empty items, such as mxfp4,mxfp8")
    words: list[str] = []
    for item in items:
        if words and _OPTION.match(item):
            words[-1] += f",{item}"
        else:
            words.append(item)
    twice = next((word for place, word in enumerate(words) if word in words[:place]), None)
    if twice is not None:
        raise AllocationError(f"candidate {twice!r} stands in the list twice")
    return distinct_candidates(parse_candidate(word) for word in words)


def distinct_candidates(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Return the candidates that mean different things, each under the word that came first."""
    found: dict[tuple[object, ...], Candidate] = {}
    for candidate in candidates:
        found.setdefault(candidate.meaning, candidate)
    return tuple(found.values())
