"""The efforts of ``best`` in order: each goes on from the one below and keeps what is better."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from family_models import family_model
from microscale.algorithms.fit import hold_out
from microscale.nn.linear import QuantizedLinear
from microscale.recipes.apply import quantize_model
from microscale.recipes.calibrated import Calibration
from microscale.recipes.recipe import make_recipe, parse_rule
from small_models import same_tensors

WINDOWS = torch.randint(3, 90, (8, 16), generator=torch.Generator().manual_seed(1))
HELD_OUT = WINDOWS[hold_out(len(WINDOWS), 0)[1]]
FAST = "rule+balance+hadamard+gptq"


def quantized(family: str, method: str, **changes: Any) -> Any:
    """Return (model, notes)."""
    model = family_model(family, dtype=torch.float32)
    recipe = make_recipe(**{"format": "mxfp4", "activations": "mxfp4", "method": method, **changes})
    report = quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS, batch=2))
    return model, [note for note in report.plan.notes if note.startswith("refine")]


@torch.no_grad()
def log_probabilities(model: Any) -> Tensor:
    return functional.log_softmax(model(input_ids=HELD_OUT, use_cache=False).logits.float(), -1).flatten(0, 1)


@functools.cache
def exact(family: str) -> Tensor:
    return log_probabilities(family_model(family, dtype=torch.float32))


def divergence(family: str, model: Any) -> float:
    """Return KL(unquantized || quantized) on the windows that no refining learns from."""
    found = functional.kl_div(log_probabilities(model), exact(family), log_target=True, reduction="batchmean")
    return float(found)


@pytest.mark.parametrize("activations", ["mxfp4", "none"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_effort_is_worse_than_the_one_below(family: str, activations: str) -> None:
    """Whatever the rate: what it made worse is the result of the effort below, to the bit."""
    fast, _ = quantized(family, FAST, activations=activations)
    for rate in (0.5, 20.0):
        tried, (note,) = quantized(family, f"{FAST}+refine:epochs=2,batch=1,rate={rate}", activations=activations)
        if "is kept" in note:
            assert not same_tensors(dict(fast.state_dict()), dict(tried.state_dict()))
        else:
            assert divergence(family, tried) < divergence(family, fast)


def test_a_second_step_goes_on_from_the_first() -> None:
    """It can learn from its start: with a rate of 0 its result is the first one's weights, rounded once more."""
    chain = "rtn+refine:epochs=16,batch=1,rate=2"
    good, (note,) = quantized("llama", chain)
    assert "is left for what was learned" in note
    most, notes = quantized("llama", f"{chain}+refine:epochs=1,rate=0")
    assert len(notes) == 2
    assert not same_tensors(dict(good.state_dict()), dict(most.state_dict()))


def test_what_was_learned_is_what_runs() -> None:
    """The note's figure is that of the model that comes out, with its biases, transforms and folded scales."""
    for family in ("llama", "opt"):
        model, (note,) = quantized(family, f"{FAST}+refine:epochs=8,batch=1,rate=8")
        before, after = re.split(r"windows? ", note, maxsplit=1)[1].split(", ")
        told = float((before if "is kept" in note else after).split()[0])
        assert divergence(family, model) == pytest.approx(told, rel=0.02)
        assert any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_layers_that_stay_float_stand_beside_it() -> None:
    """A rule may leave layers alone; the others learn without them."""
    rules = (parse_rule("*mlp*=none"),)
    model, (note,) = quantized("llama", f"{FAST}+refine:epochs=2,batch=1,rate=0.5", rules=rules)
    assert "refine" in note
    kinds = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(("windows", "is_noted"), [(1, True), (8, False)])
def test_layers_with_fewer_tokens_than_inputs_are_named(windows: int, is_noted: bool) -> None:
    """16 tokens say nothing of a layer with 32 inputs; 128 say something."""
    model = family_model("llama", dtype=torch.float32)
    recipe = make_recipe(format="mxfp4", method="gptq", exclude=("down_proj",))
    report = quantize_model(model, recipe, calibration=Calibration(windows=WINDOWS[:windows], batch=2))
    told = [note for note in report.plan.notes if "fewer tokens than they have inputs" in note]
    assert bool(told) is is_noted
    assert not told or "q_proj 16 tokens for 32 inputs" in told[0]
