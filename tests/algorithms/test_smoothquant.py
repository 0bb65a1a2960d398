"""SmoothQuant: equation 4 by hand, the common power of two, the search, and the gain that it must bring."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from method_problems import COLS, group_problem, input_rows, layer_problem, random
from microscale.algorithms.contract import FoldStep, GroupProblem
from microscale.algorithms.objective import group_error
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.smoothquant import SEARCHED_ALPHAS, SmoothQuant, smoothing_scale
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError


def smoothing(options: str, group: GroupProblem) -> Tensor:
    step = parse_method(f"smoothquant{options}").steps[0]
    assert isinstance(step, FoldStep)
    return step.input_scale(group)


def test_smoothing_that_gains_too_little_is_left_out() -> None:
    """Outlier channels that meet small weights gain much; the factor that they gain is the bar."""
    outliers = torch.ones(COLS)
    outliers[3::32] = 40.0
    rows = random(192, COLS, seed=3)
    layer = layer_problem(inputs=rows * outliers)
    easy = group_problem(dataclasses.replace(layer, weight=layer.weight / outliers))
    none = torch.ones(COLS)
    gain = group_error(easy, none) / group_error(easy, smoothing("", easy))
    assert gain > 3
    assert torch.equal(smoothing(f":gain={0.99 * gain}", easy), smoothing("", easy))
    assert torch.equal(smoothing(f":gain={1.01 * gain}", easy), none)
    flat = group_problem(layer_problem(inputs=rows))
    assert torch.equal(smoothing(":gain=3", flat), none) and not torch.equal(smoothing("", flat), none)
    with pytest.raises(RecipeError, match="gain is 0 or more"):
        parse_method("smoothquant:gain=-1")


def test_the_scales_of_smoothing_are_near_one() -> None:
    """A common power of two is taken out: nothing changes but what a folded norm looks like."""
    group = group_problem(layer_problem(inputs=input_rows() * 300))
    scale = smoothing("", group)
    assert abs(float(scale.log2().mean())) <= 0.5 + 1e-6
    inputs, weights = group.inputs, group.layers[0].weight.abs().amax(0)
    assert inputs is not None
    ratio = scale / (inputs.amax / weights).sqrt()  # arXiv 2211.10438 equation 4 with alpha = 1/2
    torch.testing.assert_close(ratio, ratio[:1].expand(COLS))
    assert float(ratio[0].log2()) == pytest.approx(round(float(ratio[0].log2())), abs=1e-5)


@pytest.mark.parametrize(
    ("inputs", "weights", "alpha", "scale"),
    [
        ([16.0, 4.0, 1.0], [1.0, 1.0, 4.0], 0.5, [2.0, 1.0, 0.25]),  # 4, 2, 1/2 over 2^round(2/3)
        ([16.0, 4.0, 1.0], [1.0, 1.0, 4.0], 1.0, [4.0, 1.0, 0.25]),  # the inputs over 2^2
        ([16.0, 4.0, 1.0], [1.0, 1.0, 4.0], 0.0, [2.0, 2.0, 0.5]),  # 1 / weights over 2^round(-2/3)
        ([0.0, 16.0], [1.0, 1.0], 0.5, [1.0, 1.0]),  # a channel without input is left, and does not count
        ([16.0, 4.0], [0.0, 1.0], 0.5, [1.0, 1.0]),  # so is one without weights
        ([0.0, 0.0], [0.0, 1.0], 0.5, [1.0, 1.0]),
        ([torch.inf, 4.0], [1.0, 1.0], 0.5, [1.0, 1.0]),
        ([torch.nan, 4.0], [1.0, 1.0], 0.5, [1.0, 1.0]),
        ([1e30, 1e-30], [1.0, 1.0], 0.5, [1e5, 1e-5]),
    ],
)
def test_the_scale_by_hand(inputs: list[float], weights: list[float], alpha: float, scale: list[float]) -> None:
    found = smoothing_scale(torch.tensor(inputs), torch.tensor(weights), alpha)
    torch.testing.assert_close(found, torch.tensor(scale), rtol=1e-6, atol=0)


@given(seed=st.integers(0, 500), alpha=st.floats(0, 1))
def test_it_is_equation_4_but_for_a_power_of_two(seed: int, alpha: float) -> None:
    inputs, weights = random(16, seed=seed).exp(), random(16, seed=seed + 1000).exp()
    ratio = (
        smoothing_scale(inputs, weights, alpha).double() * weights.double() ** (1 - alpha) / inputs.double() ** alpha
    )
    exponent = float(ratio[0].log2())
    assert exponent == pytest.approx(round(exponent), abs=1e-5)
    torch.testing.assert_close(ratio, ratio[:1].expand(16), rtol=1e-5, atol=0)


def test_weights_of_all_layers_of_a_group_count() -> None:
    layers = [layer_problem(rows=4, seed=i, name=f"layers.{i}") for i in range(2)]
    group = group_problem(*layers)
    assert group.inputs is not None
    largest = torch.cat([layer.weight for layer in layers]).abs().amax(0)
    assert torch.equal(SmoothQuant().input_scale(group), smoothing_scale(group.inputs.amax, largest, 0.5))


def test_the_search_is_over_the_exponents_of_the_paper() -> None:
    group = group_problem()
    errors = [group_error(group, SmoothQuant(alpha=alpha).input_scale(group)) for alpha in SEARCHED_ALPHAS]
    assert len(errors) == 11
    assert group_error(group, SmoothQuant(search=True).input_scale(group)) == min(errors)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_exponent_lies_between_0_and_1(alpha: float) -> None:
    with pytest.raises(RecipeError, match=f"smoothquant: alpha is between 0 and 1, got {alpha}"):
        SmoothQuant(alpha=alpha)


def test_what_must_be_measured() -> None:
    assert SmoothQuant().wanted == Wanted.RANGE
    assert SmoothQuant(search=True).wanted == SmoothQuant(gain=2.0).wanted == Wanted.SAMPLE
