"""Macro-block scaling: the factors of the paper's search, each the best of its own run of channels."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from method_problems import group_problem, input_rows, layer_problem
from microscale.algorithms.macro_block import MacroBlock
from microscale.algorithms.objective import group_error
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError


def test_macro_block_factors() -> None:
    """One factor for each run of 128 channels, from the 16 of the paper's search, and better than none."""
    inputs = input_rows(cols=320)
    group = group_problem(
        layer_problem(cols=320, inputs=inputs), layer_problem(cols=320, inputs=inputs, seed=1, name="other")
    )
    scale = MacroBlock().input_scale(group)
    for run in scale.split(128):
        assert len(run.unique()) == 1 and float(run[0] * 16) % 1 == 0 and 1 <= float(run[0]) < 2
    assert group_error(group, scale) < group_error(group, torch.ones(320))


@pytest.mark.parametrize(("cols", "size"), [(128, 32), (128, 64), (80, 32)])
def test_every_run_takes_the_best_of_its_own_errors(cols: int, size: int) -> None:
    """Seen alone, with zeros in the place of all other weights, no factor serves a run better."""
    inputs = input_rows(40, cols)
    group = group_problem(layer_problem(rows=8, cols=cols, inputs=inputs))
    scale = MacroBlock(size=size, candidates=4).input_scale(group)
    assert scale.shape == (cols,)
    for start in range(0, cols, size):
        inside = (torch.arange(cols) // size == start // size).to(torch.float32)
        layer = dataclasses.replace(group.layers[0], weight=group.layers[0].weight * inside)
        alone = dataclasses.replace(group, layers=(layer,))
        errors = [group_error(alone, torch.full((cols,), factor)) for factor in (1.0, 1.25, 1.5, 1.75)]
        assert group_error(alone, scale) == pytest.approx(min(errors), rel=1e-5)


def test_without_anything_to_gain_all_are_one() -> None:
    group = group_problem(layer_problem(inputs=torch.zeros(4, 64)))
    assert torch.equal(MacroBlock().input_scale(group), torch.ones(64))
    assert torch.equal(MacroBlock(candidates=1).input_scale(group_problem()), torch.ones(64))


@pytest.mark.parametrize(("size", "candidates"), [(0, 16), (128, 0), (-1, 16)])
def test_options_that_make_no_sense(size: int, candidates: int) -> None:
    with pytest.raises(RecipeError, match=f"macroblock: size and candidates are positive, got {size} and {candidates}"):
        MacroBlock(size=size, candidates=candidates)
    assert MacroBlock().wanted == Wanted.SAMPLE
