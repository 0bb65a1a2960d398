"""What no method can do, by its chain alone."""

from __future__ import annotations

import pytest

from microscale.algorithms.pipeline import parse_method
from microscale.errors import CalibrationError
from microscale.recipes.refusals import refuse_whole, refuse_without_text


@pytest.mark.parametrize(
    ("method", "step"), [("quarot", "quarot"), ("spinquant", "spinquant"), ("quarot+gptq", "quarot")]
)
def test_steps_for_the_whole_model_are_refused_layer_by_layer(method: str, step: str) -> None:
    text = parse_method(method).text
    with pytest.raises(CalibrationError) as caught:
        refuse_whole([parse_method("gptq"), parse_method(method)])
    assert str(caught.value) == (
        f"method {text}: {step} works on the whole model at once, but with --offload its layers are read one by one;"
        " leave --offload out, or take another method"
    )


def test_chains_that_learn_are_named_together() -> None:
    with pytest.raises(CalibrationError) as caught:
        refuse_without_text(parse_method(word) for word in ("rtn", "gptq", "awq"))
    gptq, awq = parse_method("gptq").text, parse_method("awq").text
    assert str(caught.value) == (
        f"method {gptq}, {awq} needs calibration text: give --calibration FILE (calibration=... in Python)"
    )


@pytest.mark.parametrize("method", ["rtn", "hadamard+rtn", "mxplus+rtn"])
def test_chains_that_see_no_text_pass(method: str) -> None:
    pipelines = [parse_method(method)]
    refuse_without_text(pipelines)
    refuse_whole(pipelines)
    assert not pipelines[0].needs_calibration
