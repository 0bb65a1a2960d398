"""Candidates: how words become formats and methods, and back."""

from __future__ import annotations

import pytest

from microscale.errors import AllocationError
from microscale.planning import (
    Candidate,
    parse_candidate,
    parse_candidates,
)


def words_of(candidate: Candidate) -> tuple[str | None, ...]:
    parts = (candidate.weights, candidate.activations, candidate.method)
    return tuple(None if part is None else str(part) for part in parts)


@pytest.mark.parametrize(
    ("text", "weights", "activations"),
    [
        ("mxfp4", "mxfp4", "mxfp4"),
        ("mxfp4/mxfp8", "mxfp4", "mxfp8"),
        ("mxfp4/none", "mxfp4", None),
        ("none", "none", None),
        ("int2/64:fp16:asym", "int2/64:fp16:asym", "int2/64:fp16:asym"),
        ("int2/64:fp16:asym/mxfp8", "int2/64:fp16:asym", "mxfp8"),
    ],
)
@pytest.mark.parametrize("method", [None, "micromix:bits=5.0,wider=(mxfp6_e2m3)", "rtn", "mxplus+micromix"])
def test_candidates(text: str, weights: str, activations: str | None, method: str | None) -> None:
    if method is None or weights != "none":
        found = parse_candidate(text if method is None else f"{text}@{method}")
        assert words_of(found) == (weights, activations, method)
        assert parse_candidate(found.text) == found


def test_a_method_alone_starts_from_mxfp4() -> None:
    found = parse_candidates("micromix:bits=5.0,wider=(mxfp6_e2m3,mxfp8),weights=base,mxfp8,adaptive-2-4")
    assert [words_of(candidate) for candidate in found] == [
        ("mxfp4", "mxfp4", "micromix:bits=5.0,wider=(mxfp6_e2m3,mxfp8),weights=base"),
        ("mxfp8", "mxfp8", None),
        ("mxfp4", "mxfp4", "adaptive-2-4"),
    ]
    assert found[0].text == str(found[0].method)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        ",mxfp4",
        "mxfp4,,mxfp8",
        "mxfp5",
        "mxfp4,mxfp4",
        "none/mxfp4",
        "none@rtn",
        "mxfp4@distill",
        "mxfp4@quarot",
        "mxfp4@awq",
        "mxfp4/nvfp4@static",
        "mxfp4/mxfp5",
        "mxfp4:prescale(0.75",
    ],
)
def test_bad_candidates(text: str) -> None:
    with pytest.raises(AllocationError):
        parse_candidates(text)


def test_commas_inside_of_a_format_are_its_own() -> None:
    assert [c.text for c in parse_candidates("mxfp4:prescale(0.75), mxfp8,")] == ["mxfp4:prescale(0.75)", "mxfp8"]
