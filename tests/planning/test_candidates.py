"""Candidates: how words become formats and methods, and back."""

from __future__ import annotations

import pytest

from microscale.errors import AllocationError
from microscale.formats import parse_format
from microscale.planning.candidates import Candidate, parse_candidate, parse_candidates


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "formats '' must be a list without empty items, such as mxfp4,"),
        ("mxfp4,,mxfp8", "'mxfp4,,mxfp8' must be a list without empty items"),
        ("mxfp8,mxfp4,mxfp8", "candidate 'mxfp8' stands in the list twice"),
        ("none/mxfp4", "candidate 'none/mxfp4' rounds the inputs of a layer that it leaves alone"),
        ("none@rtn", "candidate 'none@rtn' has a method for a layer that it leaves alone"),
        ("mxfp4@quarot", "step quarot changes more than one layer, so it cannot be chosen for one alone"),
        ("mxfp4/nvfp4@static", "allocation measures inputs with dynamic ranges only, not static"),
        ("mxfp5", "candidate 'mxfp5' must read WEIGHTS[/ACTIVATIONS][@METHOD]\\n"),
    ],
)
def test_what_bad_candidates_are_told(text: str, words: str) -> None:
    with pytest.raises(AllocationError) as caught:
        parse_candidates(text)
    assert words.replace("\\n", "\n") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("mxfp4", (8, 64), 4 + 8 / 32),
        ("mxfp8/none", (8, 64), 8 + 8 / 32),
        ("nvfp4", (8, 64), 4 + 8 / 16 + 32 / (8 * 64)),  # a float32 for the whole tensor
        ("int4/channel:bf16", (8, 64), 4 + 16 / 64),
        ("micromix:bits=5.0", (8, 64), 4 + 8 / 32),  # the narrowest segment
        ("none", (8, 64), 16.0),
    ],
)
def test_bits_per_weight(text: str, shape: tuple[int, int], bits: float) -> None:
    assert parse_candidate(text).bits_per_weight(shape, 16.0) == pytest.approx(bits, rel=1e-12)


def test_what_the_words_said_of_the_inputs() -> None:
    """A candidate that names its inputs equals one that does not where both round them alike."""
    plain, named, kept = (parse_candidate(text) for text in ("mxfp4", "mxfp4/mxfp4", "mxfp4/none"))
    assert plain == named and (plain.names_inputs, named.names_inputs, kept.names_inputs) == (False, True, True)
    assert plain.text == named.text == "mxfp4" and kept.text == "mxfp4/none"
    assert plain.inputs_format == parse_format("mxfp4") and kept.inputs_format is None
    assert parse_candidate("none").is_kept and not kept.is_kept
