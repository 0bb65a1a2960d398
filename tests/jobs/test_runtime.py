"""Which runtime ran a model: the level and the calls of what really ran, and who needs float copies of its weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from family_models import family_model
from microscale.integrations.engines import TransformersEngine, make_engine
from microscale.jobs import runtime
from microscale.jobs.runtime import float_weights, runtime_facts
from microscale.kernels import Operation, dispatch
from microscale.nn.linear import QuantizedLinear
from microscale.recipes.apply import quantize_model
from microscale.recipes.recipe import make_recipe

REFERENCE = dispatch.BACKENDS[-1]
FAST = dataclasses.replace(REFERENCE, name="fast", level=lambda: "level 7")


@pytest.mark.parametrize(
    ("ran", "level"),
    [({}, "none"), ({"reference": 3}, "none"), ({"fast": 2}, "level 7"), ({"fast": 2, "reference": 1}, "level 7")],
)
def test_the_level_is_that_of_the_backends_that_ran(
    ran: dict[str, int], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "BACKENDS", [FAST, REFERENCE])
    engine = TransformersEngine(family_model("llama"), "it was asked for")
    facts = runtime_facts(engine, Counter({(Operation.LINEAR, name): count for name, count in ran.items()}))
    assert (facts.runtime, facts.why_not_decoder, facts.level) == ("transformers", "it was asked for", level)
    assert facts.executed == ({"linear": ran} if ran else {}) and facts.threads == torch.get_num_threads()


def test_only_transformers_keeps_float_copies() -> None:
    model: Any = family_model("llama", dtype=torch.float32)
    quantize_model(model, make_recipe(format="mxfp4"))
    layer = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    with float_weights(TransformersEngine(model, "reason")):
        assert layer.float_weight(torch.float32) is not None
    assert layer.float_weight(torch.float32) is None
    with float_weights(make_engine(model, positions=8)):
        assert layer.float_weight(torch.float32) is None
