"""Formats and activation settings beside their words."""

from __future__ import annotations

import pytest

from microscale.errors import FormatError
from microscale.formats import (
    ActivationSpec,
    parse_activation,
    parse_format,
    parse_inputs,
    parse_weights,
    parse_weights_and_inputs,
)


def test_words_stay_as_they_were_written() -> None:
    written = parse_weights("mxfp8")
    assert str(written) == "mxfp8" and written.record == parse_format("mxfp8_e4m3")
    assert written != parse_weights("mxfp8_e4m3") and parse_weights(written) is written
    assert parse_weights("none").record is None and parse_inputs("none").record is None


def test_records_get_their_name() -> None:
    fmt = parse_format("mxfp8")
    assert parse_weights(fmt) == parse_weights("mxfp8_e4m3") and parse_weights(fmt).record is fmt
    assert str(parse_inputs(parse_activation("nvfp4@static"))) == "nvfp4@static"
    assert parse_inputs(fmt).record == ActivationSpec(format=fmt)


@pytest.mark.parametrize(
    ("text", "weights", "inputs"),
    [
        ("mxfp4", "mxfp4", None),
        ("mxfp4/none", "mxfp4", "none"),
        ("none", "none", None),
        ("int2/64:fp16:asym", "int2/64:fp16:asym", None),
        ("int2/64:fp16:asym/e4m3/tensor:fp32@static", "int2/64:fp16:asym", "e4m3/tensor:fp32@static"),
    ],
)
def test_the_longest_reading_of_the_weights_is_taken(text: str, weights: str, inputs: str | None) -> None:
    first, second = parse_weights_and_inputs(text)
    assert (str(first), None if second is None else str(second)) == (weights, inputs)


@pytest.mark.parametrize("text", ["", "/", "mxfp4/", "/mxfp4", "mxfp4/mxfp8/mxfp8", "mxfp5"])
def test_what_is_no_format_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_weights_and_inputs(text)
