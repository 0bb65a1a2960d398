"""Fields of recipes and studies that are written as words: each is read once, and dumped as it was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError

from microscale.algorithms.pipeline import Method, Pipeline, read_method
from microscale.algorithms.registry import PLAIN
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
