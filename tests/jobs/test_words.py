"""The words of formats where layers are counted, and of lengths of time."""

from __future__ import annotations

import pytest

from microscale.formats import parse_activation, parse_format
from microscale.jobs.words import activation_word, duration_text, format_word


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("e2m1/32:e8m0", "mxfp4"),
        ("segments(mxfp4*384,mxfp8*64)", "segments of mxfp4 | mxfp8_e4m3"),
        ("segments(mxfp4*32,mxfp8*32,mxfp4*64)", "segments of mxfp4 | mxfp8_e4m3"),
    ],
)
def test_segments_are_named_without_their_columns(spec: str, word: str) -> None:
    assert format_word(parse_format(spec)) == word
    assert activation_word(parse_activation(spec)) == word


def test_ranges_are_told_and_none_is_none() -> None:
    assert activation_word(parse_activation("nvfp4@static")) == "nvfp4@static" and activation_word(None) == "None"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (150, "2 min"), (3599, "1 h"), (3900, "1 h 5 min")],
)
def test_a_length_of_time_has_the_units_that_say_enough(seconds: float, words: str) -> None:
    assert duration_text(seconds) == words
