"""A format or an activation setting beside the words that it was written in.

Words are read once, where they enter; what prints a record prints the spelling that a user chose (``mxfp8``, not
``mxfp8_e4m3``). ``none`` stands for no format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from microscale.errors import FormatError, check_kind
from microscale.formats.activation import ActivationSpec, parse_activation
from microscale.formats.registry import format_name, parse_format
from microscale.formats.segmented import Format

NONE = "none"
"""The word that leaves weights or activations unquantized."""

RecordT_co = TypeVar("RecordT_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Written(Generic[RecordT_co]):
    """A record with its words; it prints as the words, and two are equal where their words are."""

    word: str
    record: RecordT_co = field(compare=False)

    def __str__(self) -> str:
        return self.word


WrittenWeights = Written[Format | None]
"""The format of weights; the record of ``none`` is None."""
WrittenInputs = Written[ActivationSpec | None]
"""The setting of a layer's inputs; the record of ``none`` is None."""


def parse_weights(given: str | Format | WrittenWeights) -> WrittenWeights:
    """Return the format of weights that a word or a record stands for.

    Raises:
        FormatSpecError: see :func:`microscale.formats.parse_format`.
    """
    if isinstance(given, Written):
        return given
    if isinstance(given, str):
        return Written(given, None if given == NONE else parse_format(given))
    return Written(format_name(given), given)


def parse_inputs(given: str | Format | ActivationSpec | WrittenInputs) -> WrittenInputs:
    """Return the setting of inputs that a word or a record stands for.

    Raises:
        FormatSpecError: see :func:`microscale.formats.parse_activation`.
    """
    if isinstance(given, Written):
        return given
    if isinstance(given, str):
        return Written(given, None if given == NONE else parse_activation(given))
    spec = parse_activation(given)
    return Written(str(spec), spec)


def parse_weights_and_inputs(text: str) -> tuple[WrittenWeights, WrittenInputs | None]:
    """Parse ``WEIGHTS[/INPUTS]``; None for inputs that are not named.

    A format may hold a slash itself (``int2/64:fp16:asym``): the longest reading of the weights is taken.

    Raises:
        FormatError: no reading as formats; it says what is wrong with the longest.
    """
    check_kind(text, str, "what is parsed", "a text such as 'mxfp4/mxfp8'", error=FormatError)
    pieces = text.split("/")
    problem: FormatError | None = None
    for cut in range(len(pieces), 0, -1):
        try:
            weights = parse_weights("/".join(pieces[:cut]))
            return weights, parse_inputs("/".join(pieces[cut:])) if cut < len(pieces) else None
        except FormatError as error:
            problem = problem or error
    assert problem is not None
    raise problem
