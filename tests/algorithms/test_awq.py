"""AWQ: scales from the grid of the paper, never worse than none."""

from __future__ import annotations

import pytest
import torch

from method_problems import COLS, group_problem, input_rows, layer_problem
from microscale.algorithms.awq import Awq
from microscale.algorithms.objective import group_error
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_the_scale_is_a_power_of_the_mean_magnitudes(steps: int) -> None:
    """s = mean|x|^alpha, over the root of its largest times its least, with alpha = i / steps."""
    group = group_problem()
    assert group.inputs is not None
    magnitude = group.inputs.require("mean_abs").double()
    found = Awq(steps=steps).input_scale(group).double()
    slope = (found.amax().log() - found.amin().log()) / (magnitude.amax().log() - magnitude.amin().log())
    assert float(slope) * steps == pytest.approx(round(float(slope) * steps), abs=1e-4) and 0 <= float(slope) <= 1.0001
    torch.testing.assert_close(found, magnitude**slope * (found[0] / magnitude[0] ** slope), rtol=1e-5, atol=0)
    assert float(found.amax() * found.amin()) == pytest.approx(1, rel=1e-5)


def test_it_is_the_best_of_the_grid() -> None:
    group = group_problem()
    assert group.inputs is not None
    magnitude = group.inputs.require("mean_abs")
    grid = [magnitude.pow(i / 4) for i in range(5)]
    errors = [group_error(group, scale / (scale.amax() * scale.amin()).sqrt()) for scale in grid]
    assert group_error(group, Awq(steps=4).input_scale(group)) == pytest.approx(min(errors), rel=1e-6)
    assert min(errors) < errors[0], "these inputs have outliers: some scaling helps"


def test_a_finer_grid_that_holds_the_other_is_no_worse() -> None:
    group = group_problem(layer_problem(activations=None, rows=8))
    errors = [group_error(group, Awq(steps=steps).input_scale(group)) for steps in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("inputs", [torch.zeros(4, COLS), torch.ones(4, COLS)])
def test_where_all_channels_are_alike_nothing_is_scaled(inputs: torch.Tensor) -> None:
    assert torch.equal(Awq().input_scale(group_problem(layer_problem(inputs=inputs))), torch.ones(COLS))


def test_a_channel_without_input_does_not_break_the_others() -> None:
    inputs = input_rows()
    inputs[:, 7] = 0.0
    scale = Awq().input_scale(group_problem(layer_problem(inputs=inputs)))
    assert bool(torch.isfinite(scale).all()) and float(scale.amin()) >= 1e-4 and float(scale.amax()) <= 1e4


def test_options() -> None:
    assert Awq().wanted == Wanted.MEAN_ABS | Wanted.SAMPLE and Awq().text == "awq"
    with pytest.raises(RecipeError, match="awq: steps is at least 1, got 0"):
        Awq(steps=0)
