"""Fields of recipes and studies that are written as words, and the records that hold them.

Each word is read once, and dumped as it was written. What is wrong with a record ends in an error of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from microscale.algorithms.pipeline import Method, Pipeline, read_method
from microscale.algorithms.registry import PLAIN
from microscale.errors import MicroscaleError, nearest, shown
from microscale.formats import (
    ActivationSpec,
    BlockFormat,
    PairFormat,
    SegmentedFormat,
    Written,
    WrittenInputs,
    WrittenWeights,
    parse_inputs,
    parse_weights,
)
from microscale.nn.attention_setting import parse_attention

UNKNOWN_KEY = "extra_forbidden"
"""What pydantic calls a key that a record does not have."""

FORMATS = (BlockFormat, PairFormat, SegmentedFormat)
RTN = read_method(PLAIN.text)


def read_by(parse: Callable[[Any], Any], *records: type) -> PlainValidator:
    """Return a validator that gives words and the records of some classes to a parser, and refuses all else."""

    def validate(given: object) -> Any:
        if not isinstance(given, (str, Written, *records)):
            raise PydanticCustomError("string_type", "Input should be a valid string")
        return parse(given)

    return PlainValidator(validate)


def parse_rounded(given: Any) -> WrittenWeights:
    """Return what attention or its cache is rounded to.

    Raises:
        FormatError: see :func:`microscale.nn.attention_setting.parse_attention`.
    """
    written = parse_inputs(given)
    return Written(written.word, parse_attention(written.record))


AS_WRITTEN = PlainSerializer(str, return_type=str)
WeightsField = Annotated[WrittenWeights, read_by(parse_weights, *FORMATS), AS_WRITTEN]
"""Weights: a format or ``none``."""
InputsField = Annotated[WrittenInputs, read_by(parse_inputs, ActivationSpec, *FORMATS), AS_WRITTEN]
"""Inputs of layers: a format with its range, or ``none``."""
RoundedField = Annotated[WrittenWeights, read_by(parse_rounded, ActivationSpec, *FORMATS), AS_WRITTEN]
"""What attention is rounded to: a format, or ``none``."""
MethodField = Annotated[Method, read_by(read_method, Method, Pipeline), AS_WRITTEN]
"""A method or a chain of steps."""


class AttentionFields(BaseModel):
    """What a recipe or a study says of attention."""

    attention: RoundedField | None = None
    kv_cache: RoundedField | None = None

    @property
    def rounding(self) -> dict[str, WrittenWeights]:
        """What is said, by the name of its field."""
        said = {name: getattr(self, name) for name in AttentionFields.model_fields}
        return {name: given for name, given in said.items() if given is not None}


class Record(BaseModel):
    """A record whose fields are checked when it is made: a wrong one ends in ``refusal``.

    ``needed`` says what it must have.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    refusal: ClassVar[type[MicroscaleError]]
    needed: ClassVar[str]

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise self.refusal(problem_text(error, type(self))) from None

    def __setattr__(self, name: str, value: object) -> None:
        del value
        raise self.refusal(f"{type(self).__name__} does not change; make another one with its own {name}")

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]
    """For pydantic: records in this one are checked with it, so that a problem is told with its whole place."""

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Return the record of a mapping; what is wrong with it ends in ``refusal``."""
        try:
            return cls.read(obj, **options)
        except ValidationError as error:
            raise cls.refusal(problem_text(error, cls)) from None

    @classmethod
    def read(cls, obj: Any, **options: Any) -> Self:
        """Return the record of a mapping, for callers that tell the place of a problem.

        Raises:
            ValidationError: see :func:`problem_text`.
        """
        return super().model_validate(obj, **options)

    @classmethod
    def known_keys(cls, location: Sequence[int | str]) -> list[str]:
        """Return the keys that are known where a key stands."""
        del location  # those of records in it, too, where there are some
        return list(cls.model_fields)


def first_error(error: ValidationError) -> Any:
    """Return the error to tell: an unknown key before all others, for it may be a misspelt one that is missing."""
    return min(error.errors(), key=lambda one: one["type"] != UNKNOWN_KEY)


def unknown_key(location: Sequence[int | str], known: Sequence[str]) -> str:
    """Return the message about a key that is none of those known, with the closest of them."""
    word = str(location[-1])
    hint = nearest(word, known) or ";"
    where = "".join(f"{piece}." for piece in location[:-1])
    return f"unknown key {where + word!r}{hint} known keys: {', '.join(known)}"


_EXPECTED = {
    "string_unicode": "a text in UTF-8",
    "model_type": "a mapping such as {{match: '*.down_proj', weights: mxfp8}}",
    "enum": "one of {expected}",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "below {lt}",
    "less_than_equal": "{le} or less",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "a text of at least {min_length}",
    "string_too_long": "a text of at most {max_length}",
    "none_required": "empty",
    "is_instance_of": "a {class}",
}
_KINDS = {
    "string": "a text",
    "int": "a whole number",
    "float": "a number",
    "decimal": "a number",
    "bool": "true or false",
    "bytes": "bytes",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "iterable": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "dataclass": "a mapping",
}
"""What a record says of a value of the wrong kind, by pydantic's name of the problem and by how that name begins."""


def problem_text(error: ValidationError, record: type[Record]) -> str:
    """Return the problem to tell, in words of ours throughout."""
    first = first_error(error)
    where = ".".join(str(piece) for piece in first["loc"])
    kind, given = str(first["type"]), first["input"]
    if kind == UNKNOWN_KEY:
        return unknown_key(first["loc"], record.known_keys(first["loc"]))
    expected = _EXPECTED.get(kind) or _KINDS.get(kind.partition("_")[0])
    details = first.get("ctx", {})
    if kind == "value_error":  # raised by ours
        message = str(details["error"])
    elif kind == "missing":
        message = f"is missing; {record.needed}"
    elif expected is None:
        message = f"is not valid, got {shown(given)}"
    else:
        words = re.findall(r"'([^']+)'", str(details.get("expected", "")))
        message = f"must be {expected.format(**details)}, got {shown(given)}{nearest(given, words)}"
    return message if not where or message.startswith(("format ", "rule for ")) else f"{where}: {message}"
