"""Distillation: the mean_divergence it brings down, held-out windows that decide, rates by the number of tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from method_problems import model_problem
from microscale.algorithms.contract import GroupProblem, LayerFunction, ModelProblem, ModelStep
from microscale.algorithms.distill import ENOUGH_TOKENS, TRANSFORMS, Distill, held_out_divergence, mean_divergence
from microscale.algorithms.pipeline import parse_method
from microscale.errors import CalibrationError, RecipeError
from microscale.families.batch import Batch


def learned_from(problem: ModelProblem, options: str) -> GroupProblem:
    step = parse_method(f"distill:{options}").steps[0]
    assert isinstance(step, ModelStep)
    with torch.enable_grad():
        return step.learn(problem)[0]


def test_what_distillation_made_worse_is_taken_back() -> None:
    """Held-out windows decide; without any (a single window) what was learned stays."""
    told: list[str] = []
    problem = dataclasses.replace(model_problem(), tell=told.append)
    start = learned_from(problem, "epochs=0")
    wild = f"epochs=2,lr={100 * ENOUGH_TOKENS / problem.windows.token_ids.numel():g}"
    back = learned_from(problem, wild)
    assert torch.equal(back.layers[0].weight, start.layers[0].weight)
    assert len(told) == 1 and "1 held-out window" in told[0] and "the weights stay as they were" in told[0]
    alone = dataclasses.replace(problem, windows=problem.windows[:1])
    moved = learned_from(alone, wild)
    assert not torch.equal(moved.layers[0].weight, start.layers[0].weight) and len(told) == 1


def test_few_tokens_take_less_of_the_learning_rate() -> None:
    """The first step of Adam moves a weight by its rate: twice the tokens, twice the way."""
    small = model_problem()
    large = dataclasses.replace(small, windows=Batch(token_ids=small.windows.token_ids.repeat(2, 1)))
    start = learned_from(small, "epochs=0,transform=none").layers[0].weight
    ways: list[float] = []
    for problem in (small, large):
        one = 1 / (len(problem.windows) - 1)  # of an epoch: one window, one step
        moved = learned_from(problem, f"epochs={one},transform=none,lr=0.01").layers[0].weight
        ways.append(float((moved - start).abs().max()))
    assert ways[0] > 0 and ways[1] == pytest.approx(2 * ways[0], rel=1e-3)


def wrong(problem: ModelProblem) -> dict[str, LayerFunction]:
    """Return a stand-in that is far from its layer."""
    return {problem.groups[0].layers[0].name: lambda x: x * 0.1}


def test_the_divergence_is_that_of_scipy() -> None:
    problem = model_problem()
    exact, other = (problem.logits(each, problem.windows) for each in ({}, wrong(problem)))
    p, q = (torch.softmax(each.double(), -1).numpy() for each in (exact, other))
    expected = float(np.mean(scipy.stats.entropy(p, q, axis=-1)))
    assert float(mean_divergence(problem, wrong(problem), problem.windows)) == pytest.approx(expected, rel=1e-4)
    assert float(mean_divergence(problem, {}, problem.windows)) == 0.0


def test_held_out_windows_count_alike() -> None:
    problem = model_problem()
    found = held_out_divergence(problem, wrong(problem), problem.windows)
    assert found == pytest.approx(float(mean_divergence(problem, wrong(problem), problem.windows)), rel=1e-5)
    assert held_out_divergence(problem, wrong(problem), problem.windows[:0]) == 0.0


@pytest.mark.parametrize(
    ("transform", "words"),
    [("none", []), ("hadamard", ["hadamard(32)"]), ("block", ["block(32)"]), ("shared", ["block(32,shared)"])],
)
def test_transforms_and_what_they_leave(transform: str, words: list[str]) -> None:
    step = Distill(transform=transform, epochs=0.0)
    problem = model_problem()
    (group,) = step.learn(problem)
    (layer,) = group.layers
    assert [str(each.spec) for each in layer.transforms] == words and step.is_online is bool(words)
    torch.testing.assert_close(layer.weight, problem.groups[0].layers[0].weight)
    obstacle = step.segment_obstacle
    assert obstacle is None if not words else f"transform={transform} mixes channels" in str(obstacle)
    assert transform in TRANSFORMS


@pytest.mark.parametrize(("size", "words"), [(16, "hadamard(16)"), (128, "hadamard(64)")])
def test_a_block_is_no_larger_than_the_width_allows(size: int, words: str) -> None:
    (group,) = Distill(size=size, epochs=0.0).learn(model_problem())
    assert [str(each.spec) for each in group.layers[0].transforms] == [words]


def test_a_loss_that_left_the_numbers_is_named() -> None:
    problem = model_problem()
    broken = dataclasses.replace(problem, logits=lambda stand_ins, batch: problem.logits(stand_ins, batch) * math.nan)
    with pytest.raises(CalibrationError, match="distill: the loss became nan at step 0; lower lr or lr_transform"):
        Distill().learn(broken)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transform": "turn"}, "distill: transform is one of block, shared, hadamard, none, got 'turn'"),
        ({"epochs": -1.0}, "distill: epochs >= 0 and batch >= 1, got -1.0 and 1"),
        ({"batch": 0}, "distill: epochs >= 0 and batch >= 1, got 2.0 and 0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Distill(**options)
