"""The Python front of a job: its words, its warnings, its signature."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from microscale.errors import OptionError, QuantizationNote
from microscale.jobs.front import front
from microscale.jobs.option import Option, Options, Place
from microscale.jobs.reporting import SILENT, Reporter


@dataclass(frozen=True, slots=True, kw_only=True)
class CountOptions(Options):
    word: Annotated[str, Option(help="What is counted.", place=Place.ARGUMENT)]
    times: Annotated[int, Option(help="How often.", minimum=1)] = 2


@dataclass(frozen=True)
class CountResult:
    count: int
    notes: tuple[str, ...]


def count(options: CountOptions, reporter: Reporter = SILENT) -> CountResult:
    """Count letters."""
    reporter.note("this is dropped")
    with reporter.stage("counting") as advance:
        advance(1, 1, options.word)
    return CountResult(
        count=len(options.word) * options.times, notes=("one letter twice",) if options.times == 3 else ()
    )


def test_words_become_the_record() -> None:
    call: Any = front(count)
    seen: list[tuple[int, int, str]] = []
    assert call("abc", progress=lambda *step: seen.append(step)).count == call(word="abc", times=2).count == 6
    assert seen == [(1, 1, "abc")]


def test_notes_of_the_result_are_warnings_where_it_was_called() -> None:
    with pytest.warns(QuantizationNote, match="one letter twice") as found:
        front(count)("abc", times=3)
    assert found[0].filename == __file__


def test_what_is_no_word() -> None:
    with pytest.raises(OptionError, match="did you mean times"):
        front(count)("abc", time=3)
    with pytest.raises(OptionError, match="count takes word without a word"):
        front(count)("abc", 3)


def test_help_shows_the_options() -> None:
    call = front(count)
    assert str(inspect.signature(call)) == "(word: str, *, times: int = 2, progress=None)"
    assert "Count letters." in str(call.__doc__) and "times: How often." in str(call.__doc__)
