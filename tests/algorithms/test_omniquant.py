"""OmniQuant: scales and clips, each on its own or together, from a start that is no worse than none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from method_problems import block_problem, group_problem, input_rows, layer_problem, random
from microscale.algorithms.objective import group_error
from microscale.algorithms.omniquant import OmniQuant, start_scale
from microscale.algorithms.rtn import block_amax
from microscale.algorithms.smoothquant import SmoothQuant
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels.transform import apply_transforms


@pytest.mark.parametrize(("scale", "clip"), [(True, True), (True, False), (False, True)])
def test_each_half_can_be_left_out(scale: bool, clip: bool) -> None:
    problem = block_problem("int4/32:fp16", None)
    learned = OmniQuant(epochs=8, lr_clip=0.1, scale=scale, clip=clip).learn(problem)
    x = random(5, 64, seed=9)
    for old, new in zip(problem.groups[0].layers, learned[0].layers, strict=True):
        assert [str(transform.spec) for transform in new.transforms] == (["scale"] if scale else [])
        assert (new.clip is not None) is clip and torch.equal(new.weight, old.weight)
        turned = apply_transforms(x, new.transforms) @ new.target.T
        torch.testing.assert_close(turned, x @ old.weight.T, rtol=1e-4, atol=1e-4)


def test_a_clip_is_a_share_of_the_largest_of_its_block() -> None:
    learned = OmniQuant(epochs=8, lr_clip=0.1, scale=False).learn(block_problem("int4/32:fp16", None))
    for group in learned:
        for layer in group.layers:
            assert layer.clip is not None
            share = layer.clip / block_amax(layer.target, 32)
            blocks = share.unflatten(1, (-1, 32))
            assert float(share.min()) > 0 and float(share.max()) < 1
            torch.testing.assert_close(blocks, blocks[..., :1].expand_as(blocks))


def test_it_starts_from_the_best_exponent_or_from_none() -> None:
    group = group_problem()
    ones = torch.ones(64)
    found = SmoothQuant(search=True).input_scale(group)
    assert group_error(group, found) < group_error(group, ones) and torch.equal(start_scale(group), found)
    dead = group_problem(layer_problem(inputs=torch.zeros(4, 64)))
    assert torch.equal(start_scale(dead), ones), "no error can be made smaller"
    assert group_error(group, start_scale(group_problem(layer_problem(inputs=input_rows())))) <= group_error(
        group, ones
    )


def test_without_a_step_the_scale_is_the_start() -> None:
    problem = block_problem()
    learned = OmniQuant(epochs=0, clip=False).learn(problem)
    (transform,) = learned[0].layers[0].transforms
    torch.testing.assert_close(1 / transform.parts["scale"], start_scale(problem.groups[0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{"epochs": -1}, {"scale": False, "clip": False}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="omniquant: epochs is at least 0, and scale or clip must be learned"):
        OmniQuant(**options)
    assert OmniQuant().wanted == Wanted.SAMPLE and OmniQuant(scale=False).wanted == Wanted.RANGE
