"""Refine: it learns, keeps what is better on held-out windows, and takes its rate from each layer's own rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from method_problems import model_problem, tensors_of
from microscale.algorithms.block_error import rounded_stand_ins
from microscale.algorithms.contract import GroupProblem, LayerFunction, ModelProblem, RefineStep
from microscale.algorithms.distill import ENOUGH_TOKENS, held_out_divergence
from microscale.algorithms.fit import hold_out
from microscale.algorithms.pipeline import parse_method
from microscale.errors import RecipeError
from small_models import same_bits


def rounded(problem: ModelProblem) -> dict[str, LayerFunction]:
    """Return the layers rounded to nearest."""
    return rounded_stand_ins(problem.groups, problem.biases)


def refined(
    problem: ModelProblem, options: str, start: dict[str, LayerFunction] | None = None
) -> tuple[GroupProblem, ...] | None:
    step = parse_method(f"rtn+refine:{options}").steps[-1]
    assert isinstance(step, RefineStep)
    with torch.enable_grad():
        return step.refine(problem, rounded(problem) if start is None else start)


def full_rate(problem: ModelProblem, rate: float) -> str:
    """Return a rate that so few tokens take as it is."""
    return f"rate={rate * ENOUGH_TOKENS / problem.windows.token_ids.numel():g}"


def test_it_learns_what_the_held_out_windows_confirm() -> None:
    problem = model_problem()
    before = [tensor.clone() for tensor in tensors_of(problem)]
    options = f"epochs=20,batch=2,{full_rate(problem, 0.02)}"
    learned = refined(problem, options)
    assert learned is not None
    held_out = problem.windows[hold_out(len(problem.windows), problem.seed)[1]]
    old, new = (
        held_out_divergence(problem, rounded_stand_ins(one, problem.biases), held_out)
        for one in (problem.groups, learned)
    )
    assert new < old
    assert all(same_bits(a, b) for a, b in zip(before, tensors_of(problem), strict=True))
    again = refined(problem, options)
    assert all(same_bits(a, b) for a, b in zip(tensors_of(learned), tensors_of(again), strict=True))


def test_a_start_that_is_better_is_kept() -> None:
    """An exact start cannot be bettered; neither can any by steps that are far too long."""
    told: list[str] = []
    problem = dataclasses.replace(model_problem(), tell=told.append)
    assert refined(problem, f"epochs=4,{full_rate(problem, 0.006)}", start={}) is None
    assert refined(problem, f"epochs=4,batch=1,{full_rate(problem, 1000.0)}") is None
    assert len(told) == 2 and all("the rounded model is kept; KL on 1 held-out window" in note for note in told)


def test_a_single_window_leaves_nothing_to_check_on() -> None:
    told: list[str] = []
    problem = dataclasses.replace(model_problem(), tell=told.append)
    alone = dataclasses.replace(problem, windows=problem.windows[:1])
    assert refined(alone, "epochs=1") is None
    assert told == ["refine left the model as it was: it needs two windows at least, one to check itself on"]


@pytest.mark.parametrize("factor", [1 / 64, 64.0])
def test_the_rate_follows_the_size_of_the_weights(factor: float) -> None:
    """The same model with weights and inputs in other units learns the same: a rate in absolute units would not."""
    problem = model_problem(activations=None)
    (group,) = problem.groups
    scaled_layer = dataclasses.replace(group.layers[0], weight=group.layers[0].weight * factor)
    name = scaled_layer.name

    def logits(stand_ins: dict[str, LayerFunction], batch: object) -> torch.Tensor:
        inner = {key: (lambda x, f=function: f(x) / factor) for key, function in stand_ins.items()}
        return problem.logits(inner, batch)  # type: ignore[arg-type]

    scaled = dataclasses.replace(
        problem,
        groups=(dataclasses.replace(group, layers=(scaled_layer,)),),
        logits=logits,  # type: ignore[arg-type]
    )
    options = f"epochs={1 / 5},batch=1,{full_rate(problem, 0.02)}"
    plain, other = (refined(one, options, {name: lambda x: x * 0.0}) for one in (problem, scaled))
    assert plain is not None and other is not None
    one, two = plain[0].layers[0].weight - group.layers[0].weight, other[0].layers[0].weight - scaled_layer.weight
    assert float(two.abs().max()) == pytest.approx(factor * float(one.abs().max()), rel=1e-2)
    assert float(one.abs().max()) > 0


def test_a_batch_is_the_mean_of_its_windows() -> None:
    """Windows run one after the other, and one step is taken for all: the same one twice is one of itself."""
    problem = model_problem()
    learned, held_out = hold_out(len(problem.windows), problem.seed)
    twin = problem.windows.token_ids.clone()
    twin[learned] = twin[learned[0]].clone()
    same = dataclasses.replace(problem, windows=dataclasses.replace(problem.windows, token_ids=twin))
    share = 1 / len(learned)
    rate = full_rate(same, 0.05)
    worst = {problem.groups[0].layers[0].name: lambda x: x * 0.0}
    one = refined(same, f"epochs={share},batch=1,{rate}", worst)
    two = refined(same, f"epochs={2 * share},batch=2,{rate}", worst)
    assert one is not None and two is not None and len(held_out) == 1
    torch.testing.assert_close(one[0].layers[0].weight, two[0].layers[0].weight)


@pytest.mark.parametrize("options", ["epochs=-1", "batch=0", "rate=-0.1"])
def test_options_out_of_range(options: str) -> None:
    with pytest.raises(RecipeError, match="refine: epochs >= 0, batch >= 1 and rate >= 0"):
        parse_method(f"rtn+refine:{options}")


def test_a_side_path_cannot_stand_beside_it() -> None:
    with pytest.raises(RecipeError, match="lowrank makes up for a rounding that refine changes"):
        parse_method("rtn+refine+lowrank")
