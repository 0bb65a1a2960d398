"""Stand-ins: by which method they are made, and what they are."""

from __future__ import annotations

from typing import Any

import pytest

from measured_models import FORMATS, table_of
from microscale.planning.candidates import parse_candidate
from microscale.planning.stand_ins import layer_method, measured_method


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
