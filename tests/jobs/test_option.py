"""Records of options: one field is the flag, the keyword and the check."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from microscale.errors import OptionError
from microscale.jobs.option import Option, Options, Place, options_of, record_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Text(Options):
    source: Annotated[str | None, Option(help="What is read.", word="calibration")] = None
    samples: Annotated[int, Option(minimum=1)] = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Options):
    model: Annotated[Any, Option(help="The model.", place=Place.ARGUMENT)]
    text: Text = Text(samples=8)
    share: Annotated[float, Option(minimum=0.0, maximum=1.0)] = 0.5
    output: Annotated[Path | None, Option()] = None
    include: Annotated[Sequence[str], Option()] = ()
    is_loud: Annotated[bool, Option(flag="--loud")] = False
    listener: Annotated[Callable[[str], None] | None, Option(place=Place.PYTHON)] = None
    kept: int = 3


def test_the_options_of_a_record_and_of_those_in_it() -> None:
    options = {one.word: one for one in options_of(Job)}
    assert list(options) == [
        *("model", "calibration", "samples", "share", "output", "include", "is_loud", "listener"),
    ]
    assert options["model"].default is MISSING
    assert options["samples"].default == 8  # the field's default, not the record's
    assert [options[word].flag for word in ("samples", "is_loud")] == ["--samples", "--loud"]


def test_a_record_of_words() -> None:
    job = record_from(Job, {"model": 7, "calibration": "a.txt", "output": "out", "include": ["a", "b"], "share": 1})
    assert job == Job(model=7, text=Text(source="a.txt", samples=8), output=Path("out"), include=("a", "b"), share=1)
    assert record_from(Job, {"model": 7}) == Job(model=7)
    assert record_from(Job, {"model": 7, "samples": 2}).text.samples == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sample": 3}, r"no option 'sample'; did you mean samples\? Possible: model, calibration"),
        ({"xyz": 3}, r"no option 'xyz'. Possible: model"),
        ({"kept": 3}, "no option 'kept'"),
        ({"samples": 0}, "samples is a whole number from 1 on, got 0"),
        ({"samples": "8"}, "samples is a whole number from 1 on, got '8'"),
        ({"samples": True}, "samples is a whole number from 1 on, got True"),
        ({"samples": None}, "samples is a whole number from 1 on, got None"),
        ({"share": 1.5}, "share is a number from 0 to 1, got 1.5"),
        ({"share": math.nan}, "share is a number from 0 to 1, got nan"),
        ({"output": 5}, r"output is a path \(str or Path\), got 5"),
        ({"include": "lm_head"}, "include is a list of texts, such as .*, got 'lm_head'"),
        ({"include": [1]}, "include is a list of texts"),
        ({"is_loud": 1}, "is_loud is True or False, got 1"),
        ({"calibration": 1}, "calibration is a text, got 1"),
        ({"listener": "x"}, "listener is a function, got 'x'"),
    ],
)
def test_what_no_option_takes(words: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        record_from(Job, {"model": 7, **words})


def test_what_must_be_given() -> None:
    with pytest.raises(OptionError, match=r"model must be given: The model\."):
        record_from(Job, {})
