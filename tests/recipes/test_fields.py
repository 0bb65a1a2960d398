"""Fields that are written as words: read once into records, dumped as they were written, refused by kind."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from microscale.algorithms.pipeline import parse_method
from microscale.errors import FormatError
from microscale.formats import BlockFormat, parse_activation, parse_format
from microscale.recipes.fields import (
    FORMATS,
    RTN,
    InputsField,
    MethodField,
    RoundedField,
    WeightsField,
    parse_rounded,
)


class Words(BaseModel):
    """One field of each kind."""

    model_config = ConfigDict(frozen=True)

    weights: WeightsField | None = None
    inputs: InputsField | None = None
    rounded: RoundedField | None = None
    method: MethodField = RTN


@pytest.mark.parametrize(
    ("field", "word", "record"),
    [
        ("weights", "e2m1/32:e8m0", parse_format("mxfp4")),
        ("weights", "none", None),
        ("inputs", "nvfp4@static", parse_activation("nvfp4@static")),
        ("rounded", "mxfp8", parse_format("mxfp8")),
        ("rounded", "none", None),
    ],
)
def test_a_word_is_read_once_and_dumped_as_written(field: str, word: str, record: object) -> None:
    words = Words.model_validate({field: word})
    assert getattr(words, field).record == record
    assert words.model_dump(mode="json")[field] == word
    assert Words(**words.model_dump(mode="json", exclude_none=True)) == words


@pytest.mark.parametrize("record", [parse_format("mxfp4"), parse_format("adaptive_2_4")])
def test_records_are_taken_as_they_are_and_dumped_as_words(record: Any) -> None:
    assert isinstance(record, FORMATS)
    words = Words.model_validate({"weights": record})
    assert words.weights is not None and words.weights.record is record
    assert parse_format(words.model_dump(mode="json")["weights"]) == record


def test_a_method_is_a_chain() -> None:
    chain = parse_method("awq+gptq")
    words = Words.model_validate({"method": "awq+gptq"})
    assert words.method.pipeline().text == chain.text
    assert words.model_dump(mode="json")["method"] == "awq+gptq"
    assert Words().method is RTN


@pytest.mark.parametrize("field", ["weights", "inputs", "rounded", "method"])
@pytest.mark.parametrize("wrong", [7, 1.5, True, ["mxfp4"], {"format": "mxfp4"}, b"mxfp4"])
def test_other_kinds_are_no_words(field: str, wrong: object) -> None:
    with pytest.raises(ValidationError, match="Input should be a valid string"):
        Words.model_validate({field: wrong})


def test_an_activation_is_no_weight() -> None:
    with pytest.raises(ValidationError):
        Words.model_validate({"weights": parse_activation("mxfp4")})


@pytest.mark.parametrize("word", ["nvfp4@static", "segments(mxfp4*32,mxfp8*32)"])
def test_attention_takes_a_format_by_the_numbers_at_hand(word: str) -> None:
    with pytest.raises(FormatError, match="attention"):
        parse_rounded(word)
    assert isinstance(parse_rounded("mxfp4").record, BlockFormat)
