"""Stand-ins: by which method they are made, and what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from measured_models import CALIBRATION, FORMATS, table_of
from microscale.errors import AllocationError
from microscale.kernels import dequantize, fake_quantize
from microscale.planning.candidates import parse_candidate, parse_candidates
from microscale.planning.stand_ins import (
    check_candidates,
    layer_method,
    make_stand_ins,
    measured_method,
    needs_text,
    repeating_method,
)


@pytest.mark.parametrize(
    ("method", "chain"),
    [
        ("rtn", "micromix:bits=5+rtn"),
        ("gptq", "micromix:bits=5+gptq"),
        ("mr-gptq", "rule+micromix:bits=5+gptq"),
        ("smoothquant", "smoothquant+micromix:bits=5+rtn"),
        ("qad", "rule+micromix:bits=5+rtn"),
        ("distill:transform=none", "micromix:bits=5+distill:transform=none+rtn"),
        ("lowrank", "micromix:bits=5+rtn+lowrank"),
    ],
)
def test_what_may_stand_beside_segments_does(method: str, chain: str) -> None:
    candidate = parse_candidate("micromix:bits=5")
    assert layer_method(candidate, method, "fast").text == chain
    assert layer_method(parse_candidate("mxfp4@rtn"), method, "fast").text == "rtn"
    is_tied = method.startswith(("smoothquant", "distill"))  # folds are left out of measuring
    assert measured_method(candidate, method, "fast").text == ("micromix:bits=5+rtn" if is_tied else chain)


def test_stand_ins_follow_the_method(model: Any) -> None:
    _, plain = table_of(model)
    _, learned = table_of(model, method="gptq")
    names = list(plain.sensitivity)
    assert any(plain.sensitivity[name][0] != learned.sensitivity[name][0] for name in names)
    assert measured_method(FORMATS[0], "mr-gptq", "fast").text.endswith("gptq")
    assert measured_method(FORMATS[0], "smoothquant", "fast").text == "rtn"


def made(model: Any, names: list[str], words: str) -> dict[str, list[Any]]:
    return make_stand_ins(
        model,
        names,
        parse_candidates(words),
        method="rtn",
        effort="fast",
        calibration=CALIBRATION,
        progress=lambda done, total, label: None,
    )


def test_stand_ins_are_the_layers_in_each_candidate(model: Any) -> None:
    names = ["model.layers.0.mlp.down_proj", "lm_head"]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = made(model, names, "mxfp4,none,mxfp8/none")
    assert list(found) == names
    for name in names:
        four, kept, eight = found[name]
        weight = model.get_submodule(name).weight.detach()
        assert kept is None and (str(four.activations.spec), eight.activations) == ("mxfp4", None)
        assert torch.equal(dequantize(four.tensor), fake_quantize(weight, "mxfp4"))
        assert torch.equal(dequantize(eight.tensor), fake_quantize(weight, "mxfp8"))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert isinstance(model.lm_head, torch.nn.Linear)


@pytest.mark.parametrize(
    ("words", "method", "is_needed"),
    [
        ("mxfp4,mxfp8", "rtn", False),
        ("mxfp4", "gptq", True),
        ("mxfp8,mxfp4@gptq", "rtn", True),
        ("none", "gptq", False),
        ("mxfp4", "smoothquant", False),  # its fold is left out of measuring
        ("mxfp4", "distill:transform=none", False),
    ],
)
def test_text_is_asked_for_where_a_method_needs_it(words: str, method: str, is_needed: bool) -> None:
    assert needs_text(parse_candidates(words), method, "fast") is is_needed


def test_candidates_that_cannot_serve_are_refused_before_measuring(model: Any) -> None:
    names = ["model.layers.0.mlp.down_proj"]
    check_candidates(model, names, parse_candidates("mxfp4,none"), method="gptq", effort="fast")
    with pytest.raises(AllocationError) as caught:
        check_candidates(model, names, parse_candidates("mxfp8,mxfp4@micromix:bits=3"), method="rtn", effort="fast")
    first, *_, last = str(caught.value).splitlines()
    assert first.startswith("candidate micromix:bits=3 does not serve: ")
    assert last == "leave it out of the formats, or choose another method"


def test_segments_are_repeated_with_their_counts(model: Any) -> None:
    """The recipe cuts a layer as its stand-in was cut, whatever lies beside it."""
    name, word = "model.layers.0.mlp.up_proj", "micromix:bits=6.5,wider=(mxfp6_e2m3)"
    (stand_in,) = made(model, [name], word)[name]
    segments = stand_in.tensor.format.segments
    chain = repeating_method(stand_in, parse_candidate(word), "gptq", "fast")
    assert chain is not None
    counts = ",".join(str(segment.cols) for segment in segments)
    assert chain.text == f"micromix:wider=(mxfp6_e2m3),counts=({counts})+gptq"
    assert sum(segment.cols for segment in segments) == 64
    assert repeating_method(None, parse_candidate(word), "gptq", "fast") is None
    assert repeating_method(stand_in, parse_candidate("mxfp4"), "gptq", "fast") is None
