"""SpinQuant: Cayley steps stay rotations, and the learned one is never worse than its start."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional

from method_problems import COLS, check_orthogonal, rotation_problem
from microscale.algorithms.contract import RotationStep
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.rotation import start_rotation
from microscale.algorithms.spinquant import SpinQuant, cayley_step, mean_keeping_step, token_loss
from microscale.errors import CalibrationError, RecipeError
from microscale.formats import parse_format
from small_models import same_bits


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("text", ["quarot", "spinquant:steps=6"])
def test_rotations(text: str, keeps_mean: bool) -> None:
    rotating = parse_method(text).steps[0]
    assert isinstance(rotating, RotationStep)
    problem = rotation_problem(keeps_mean=keeps_mean)
    turn = rotating.rotation(problem)
    check_orthogonal(turn)
    assert same_bits(turn, rotating.rotation(problem))
    head = rotating.head_rotation(16, 0)
    assert head is not None
    check_orthogonal(head)
    if keeps_mean and rotating.is_learned:
        ones = torch.ones(COLS, dtype=torch.float64)
        torch.testing.assert_close(turn.T @ ones, ones, rtol=0, atol=1e-4)


def test_spinquant_is_never_worse_than_its_start() -> None:
    problem = rotation_problem()
    assert problem.model is not None
    windows = problem.model.windows
    start = start_rotation(COLS, 0).to(torch.float32)
    learned = SpinQuant(steps=12, batch=6).rotation(problem).to(torch.float32)
    with torch.no_grad():
        before, after = (float(token_loss(problem, problem.model, turn, windows)) for turn in (start, learned))
    assert after <= before


def test_cayley_steps_go_down_and_stay_orthogonal() -> None:
    """The nearest rotation to a given one is found: |R - T|^2 falls at every step."""
    wanted, turn = start_rotation(24, 1).to(torch.float32), start_rotation(24, 2).to(torch.float32)
    if torch.linalg.det(wanted) * torch.linalg.det(turn) < 0:
        wanted = torch.cat([-wanted[:1], wanted[1:]])
    distances: list[float] = []
    for _ in range(60):
        distances.append(float((turn - wanted).square().sum()))
        turn = cayley_step(turn, 2 * (turn - wanted), 0.5)
        check_orthogonal(turn)
    assert all(later <= earlier + 1e-4 for earlier, later in itertools.pairwise(distances))
    assert distances[-1] < 0.5 * distances[0]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4])
def test_a_small_step_is_the_one_of_the_paper(rate: float) -> None:
    """(1 + t/2 A)^-1 (1 - t/2 A) R with A = G R^T - R G^T, in scipy; the bound 1 / |A| is not reached."""
    turn, slope = start_rotation(8, 1), 0.01 * start_rotation(8, 2)
    wide, gradient = turn.numpy(), slope.numpy()
    skew = gradient @ wide.T - wide @ gradient.T
    unit = torch.eye(8, dtype=torch.float64).numpy()
    expected = scipy.linalg.inv(unit + rate / 2 * skew) @ (unit - rate / 2 * skew) @ wide
    torch.testing.assert_close(cayley_step(turn, slope, rate), torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_a_step_is_bounded_by_its_gradient() -> None:
    turn, slope = start_rotation(8, 1), 100 * start_rotation(8, 2)
    assert torch.equal(cayley_step(turn, slope, 1.5), cayley_step(turn, slope, 1e6))
    check_orthogonal(cayley_step(turn, slope, 1e6))


def test_a_gradient_that_only_stretches_turns_nothing() -> None:
    turn = start_rotation(8, 1)
    torch.testing.assert_close(cayley_step(turn, turn * 3, 1.0), turn)
    assert cayley_step(turn.to(torch.float32), turn.to(torch.float32), 1.0).dtype == torch.float32


def test_the_vector_of_ones_can_be_kept() -> None:
    turn = torch.eye(8, dtype=torch.float64)
    slope = start_rotation(8, 2)
    ones = torch.ones(8, dtype=torch.float64)
    kept, free = (step(turn, slope, 0.5) for step in (mean_keeping_step, cayley_step))
    torch.testing.assert_close(kept @ ones, ones, rtol=0, atol=1e-12)
    assert float((free @ ones - ones).abs().max()) > 1e-3 and not torch.equal(kept, turn)


def test_without_rounding_a_rotation_changes_no_loss() -> None:
    """x R against W R: with weights and inputs as they are the model is the same."""
    problem = rotation_problem()
    model = problem.model
    assert model is not None
    wide = [
        dataclasses.replace(layer, format=parse_format("bf16/channel:fp32"), activations=None)
        for group in model.groups
        for layer in group.layers
    ]
    groups = (dataclasses.replace(model.groups[0], layers=tuple(wide)),)
    free = dataclasses.replace(model, groups=groups)
    with torch.no_grad():
        logits = free.logits({}, free.windows)
        exact = functional.cross_entropy(logits[:, :-1].flatten(0, 1), free.windows.token_ids[:, 1:].flatten())
        for seed in (0, 1):
            turn = start_rotation(COLS, seed).to(torch.float32)
            assert float(token_loss(problem, free, turn, free.windows)) == pytest.approx(float(exact), rel=1e-3)


def test_no_step_is_the_start() -> None:
    found = SpinQuant(steps=0, seed=5).rotation(rotation_problem())
    torch.testing.assert_close(found.to(torch.float64), start_rotation(COLS, 5))


def test_heads_as_quarot_has_them() -> None:
    assert SpinQuant(values=False).head_rotation(8, 0) is None
    turn = SpinQuant(seed=2).head_rotation(8, 1)
    assert turn is not None and same_bits(turn, start_rotation(8, 4))


def test_a_loss_that_left_the_numbers_is_named() -> None:
    problem = rotation_problem()
    assert problem.model is not None
    logits = problem.model.logits

    def broken(stand_ins: Any, batch: Any) -> Tensor:
        return logits(stand_ins, batch) * math.nan

    model = dataclasses.replace(problem.model, logits=broken)
    with pytest.raises(CalibrationError, match="spinquant: the loss became nan at step 0; lower lr"):
        SpinQuant(steps=2).rotation(dataclasses.replace(problem, model=model))


@pytest.mark.parametrize("options", [{"steps": -1}, {"batch": 0}, {"lr": -0.5}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="spinquant: steps and lr are at least 0, batch at least 1"):
        SpinQuant(**options)
    assert SpinQuant.is_learned and not SpinQuant().is_online
