"""Fields that are written as words: read once into records, dumped as they were written, refused by kind."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core._pydantic_core import list_all_errors  # pyright: ignore

from microscale.algorithms.pipeline import parse_method
from microscale.errors import FormatError, RecipeError
from microscale.formats import BlockFormat, parse_activation, parse_format
from microscale.recipes.fields import (
    FORMATS,
    RTN,
    InputsField,
    MethodField,
    RoundedField,
    WeightsField,
    parse_rounded,
    problem_text,
)
from microscale.recipes.recipe import Recipe


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


SAMPLES: dict[str, Any] = {
    "expected": "'fast', 'good' or 'max'",
    "expected_schemes": "'file'",
    "expected_tokens": "x",
    "pattern": "x",
    "class": "Path",
    "class_name": "Path",
    "error": ValueError("ours"),
    "error_type": "x",
    "context": {},
}
"""Details of problems of pydantic that are no numbers."""


@pytest.mark.parametrize("problem", [one["type"] for one in list_all_errors()])
def test_no_sentence_of_pydantic_is_passed_on(problem: str) -> None:
    details = next(one for one in list_all_errors() if one["type"] == problem)
    context = {key: SAMPLES.get(key, value) for key, value in (details["example_context"] or {}).items()}
    if problem not in ("value_error", "assertion_error"):
        context |= {"error": "x"} if "error" in context else {}
    line: Any = {"type": problem, "loc": ("effort",), "input": "fsat"} | ({"ctx": context} if context else {})
    error = ValidationError.from_exception_data("Recipe", [line])
    said = problem_text(error, Recipe)
    theirs = error.errors()[0]["msg"]
    assert theirs not in said and "Input should" not in said and "pydantic" not in said
    if problem not in ("value_error", "assertion_error", "extra_forbidden", "missing"):
        assert said.startswith("effort: must be ") or said == "effort: is not valid, got 'fsat' (str)"
        assert "{" not in said.replace("{match", "")


def test_a_record_ends_in_our_errors_however_it_is_made() -> None:
    for make in (
        lambda: Recipe(format="mxfp4", effort="goood"),  # pyright: ignore[reportArgumentType]
        lambda: Recipe.model_validate({"format": "mxfp4", "effort": "goood"}),
    ):
        with pytest.raises(RecipeError, match=r"effort: must be 'fast', 'good' or 'max', got 'goood'.*mean good\?"):
            make()
    with pytest.raises(RecipeError, match="Recipe does not change; make another one"):
        Recipe(format="mxfp4").effort = "good"  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    with pytest.raises(RecipeError, match=r"layout: .*did you mean compressed-tensors\?"):
        Recipe.model_validate({"format": "mxfp4", "layout": "compresed-tensors"})
