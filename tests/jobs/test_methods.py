"""The job `methods` in Python: chains by name, steps with their options, and what is no method."""

from __future__ import annotations

import pytest

import microscale
from command_line import succeed
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.registry import EFFORTS, METHODS, STEPS
from microscale.errors import RecipeError
from microscale.jobs.printing import json_value


def test_all_methods_and_steps() -> None:
    found = microscale.methods()
    efforts = [f"best --effort {effort}" for effort in EFFORTS]
    assert [one.name for one in found.methods] == [*METHODS, *efforts]
    assert [one.name for one in found.folded] == list(EFFORTS)
    assert {one.opens_in for one in found.folded} == {"transformers, vLLM"}
    assert [one.chain for one in found.methods[: len(METHODS)]] == [parse_method(word).text for word in METHODS]
    assert [step.name for step in found.steps] == list(STEPS)
    needs = {one.name: one.needs_calibration for one in found.methods}
    assert not needs["rtn"] and needs["gptq"]
    opens = {one.name: one.opens_in for one in found.methods}
    assert {opens[name] for name in ("rtn", "gptq", "smoothquant", "autoround")} == {"transformers, vLLM"}
    assert {opens[name] for name in ("mr-gptq", "flatquant", "micromix", "mxplus", *efforts)} == {"microscale"}
    assert opens["threshold"] == "transformers, vLLM (weights alone)"
    damp = next(step for step in found.steps if step.name == "gptq").options["damp"]
    assert damp == STEPS["gptq"]().damp  # type: ignore[attr-defined]
    assert json_value(found) == succeed("methods", "--json").json


def test_one_method() -> None:
    (found,) = microscale.methods("mr-gptq").methods
    assert (found.name, found.chain, found.needs_calibration) == ("mr-gptq", "rule+hadamard+gptq", True)
    with pytest.raises(RecipeError, match="unknown method or step 'x'"):
        microscale.methods("x")
