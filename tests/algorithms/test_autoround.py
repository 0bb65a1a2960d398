"""AutoRound: without a step it is rounding to nearest; with some its codes are those that were tuned."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from method_problems import COLS, block_problem, layer_problem, random
from microscale.algorithms.autoround import AutoRound
from microscale.algorithms.contract import GroupProblem
from microscale.algorithms.pipeline import parse_method
from microscale.algorithms.rtn import Rtn
from microscale.errors import RecipeError
from microscale.formats import parse_format
from microscale.kernels import dequantize, quantize
from microscale.kernels.grid import ElementGrid
from small_models import same_bits

FORMATS = ["mxfp4", "mxfp4_plus", "nvfp4", "int4_asym", "mxfp6_e2m3"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_without_a_step_it_is_round_to_nearest(fmt: str) -> None:
    problem = block_problem(fmt, "mxfp8")
    for group in AutoRound(steps=0).learn(problem):
        for layer in group.layers:
            found, expected = Rtn().quantize(layer), quantize(layer.weight, fmt)
            assert all(same_bits(part, expected.parts[name]) for name, part in found.parts.items())


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_step_rtn_makes_the_tuned_codes(fmt: str) -> None:
    """By definition: the grid of the clipped weight, and the number nearest to weight + offset."""
    problem = block_problem(fmt, None)
    learned: tuple[GroupProblem, ...] = AutoRound(steps=30).learn(problem)
    changed = 0
    for group in learned:
        for layer in group.layers:
            assert layer.offset is not None and layer.clip is not None
            grid = ElementGrid(torch.clamp(layer.weight, -layer.clip, layer.clip), layer.format)
            expected = grid.round(layer.weight + layer.offset, slice(None))
            found = dequantize(Rtn().quantize(layer), torch.float32)
            assert torch.equal(found, expected)
            assert bool((layer.offset.abs() <= 0.5 * grid.gap(layer.weight) + 1e-7).all())
            changed += int((found != dequantize(quantize(layer.weight, fmt), torch.float32)).sum())
    assert changed > 20


def test_a_later_transform_forgets_the_tuned_rounding() -> None:
    layer = dataclasses.replace(layer_problem(), offset=torch.ones(48, COLS))
    assert layer.with_transforms([]).offset is None


def test_gaps_are_distances_of_neighbours() -> None:
    grid = ElementGrid(torch.tensor([[6.0, 0.1, -0.7, 2.5, -3.5, 4.0, 7.0]]), parse_format("mxfp4"))
    values = torch.tensor([[5.0, 0.1, -0.7, 2.5, -3.5, 4.0, 7.0]])
    assert grid.gap(values).tolist() == [[2.0, 0.5, 0.5, 1.0, 1.0, 2.0, 0.0]]
    plus = ElementGrid(torch.tensor([[6.0, 0.1]]), parse_format("mxfp4_plus"))
    assert plus.gap(torch.tensor([[6.0, 0.1]])).tolist() == [[0.5, 0.5]]
    assert ElementGrid(torch.zeros(2, 32), parse_format("mxfp4_plus")).gap(random(2, 32)).abs().sum() == 0


def test_only_rounding_to_nearest_heeds_it() -> None:
    with pytest.raises(RecipeError, match="rtn must follow autoround, not gptq"):
        parse_method("autoround+gptq")
    for text in ("autoround:steps=-1", "autoround:lr=-1"):
        with pytest.raises(RecipeError, match="autoround"):
            parse_method(text)
