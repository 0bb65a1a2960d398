"""Candidates: the formats that a layer may be given, as pairs of weights and input activations.

Written ``WEIGHTS[/ACTIVATIONS]``: ``mxfp4`` rounds both, ``mxfp4/mxfp8`` gives the inputs another format,
``mxfp4/none`` leaves them, ``none`` leaves the layer as it is. A spec may hold slashes itself
(``int2/64:fp16:asym``): the longest reading of the weights that is a format is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from microscale.errors import AllocationError, FormatError
from microscale.formats import list_items
from microscale.recipes.recipe import NONE, parse_inputs, parse_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """The words of one choice for a layer; ``activations`` None means that inputs are not rounded."""

    weights: str
    activations: str | None

    @property
    def is_kept(self) -> bool:
        """Whether the layer stays unquantized."""
        return self.weights == NONE

    @property
    def text(self) -> str:
        """The shortest word that parses back."""
        if self.is_kept or self.activations == self.weights:
            return self.weights
        return f"{self.weights}/{self.activations or NONE}"

    def bits_per_weight(self, shape: tuple[int, int], kept_bits: float) -> float:
        """Bits of one weight of a layer [rows, cols], scales included; ``kept_bits`` where it is left alone."""
        fmt = parse_weights(self.weights)
        return kept_bits if fmt is None else fmt.bits_per_value(*shape)


def parse_candidate(text: str) -> Candidate:
    """Return what ``WEIGHTS[/ACTIVATIONS]`` stands for.

    Raises:
        AllocationError: no reading as formats; the message has what the format parser says.
    """
    word = text.strip()
    pieces = word.split("/")
    problem: FormatError | None = None
    for cut in range(len(pieces), 0, -1):
        weights, rest = "/".join(pieces[:cut]), "/".join(pieces[cut:])
        try:
            fmt = parse_weights(weights)
            inputs = parse_inputs(rest) if rest else None
        except FormatError as error:
            problem = problem or error
            continue
        if fmt is None:
            if inputs is not None:
                raise AllocationError(f"candidate {word!r} rounds the inputs of a layer that it leaves alone")
            return Candidate(weights=NONE, activations=None)
        if not rest:
            return Candidate(weights=weights, activations=weights)
        return Candidate(weights=weights, activations=None if rest == NONE else rest)
    raise AllocationError(f"candidate {word!r} must read WEIGHTS or WEIGHTS/ACTIVATIONS\n{problem}")


def parse_candidates(text: str) -> tuple[Candidate, ...]:
    """Return the candidates of a list with commas (those inside parentheses belong to a format).

    Raises:
        AllocationError: none, one twice, or one that cannot be read.
    """
    found = [parse_candidate(word) for word in list_items(text)]
    if not found:
        raise AllocationError(f"formats {text!r} must be a list such as mxfp4,nvfp4,mxfp6_e2m3,mxfp8")
    for index, candidate in enumerate(found):
        if candidate in found[:index]:
            raise AllocationError(f"candidate {candidate.text!r} stands in the list twice")
    return tuple(found)
