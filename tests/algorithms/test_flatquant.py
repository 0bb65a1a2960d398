"""FlatQuant: Kronecker factors of any width, and transforms that leave the function as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from method_problems import block_problem, check_orthogonal, random
from microscale.algorithms.flatquant import FlatQuant, kronecker_sizes
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels.transform import apply_transforms


@pytest.mark.parametrize(("cols", "sizes"), [(64, (8, 8)), (96, (8, 12)), (704, (22, 32)), (7, (1, 7)), (1, (1, 1))])
def test_kronecker_factors(cols: int, sizes: tuple[int, int]) -> None:
    assert kronecker_sizes(cols) == sizes


@given(cols=st.integers(1, 3000))
def test_factors_are_as_near_as_can_be(cols: int) -> None:
    outer, inner = kronecker_sizes(cols)
    assert outer * inner == cols and outer <= inner
    assert not any(cols % size == 0 for size in range(outer + 1, inner)), "no two factors lie closer"


@pytest.mark.parametrize(("diagonal", "words"), [(True, ["scale", "kronecker(8,8)"]), (False, ["kronecker(8,8)"])])
@pytest.mark.parametrize("epochs", [0, 1])
def test_what_is_learned_leaves_the_function_as_it_was(diagonal: bool, words: list[str], epochs: int) -> None:
    problem = block_problem()
    learned = FlatQuant(epochs=epochs, diagonal=diagonal).learn(problem)
    x = random(5, 64, seed=9)
    for old, new in zip(problem.groups[0].layers, learned[0].layers, strict=True):
        if new.transforms:  # else the start was the best
            assert [str(transform.spec) for transform in new.transforms] == words
            exact = x @ old.weight.T
            torch.testing.assert_close(apply_transforms(x, new.transforms) @ new.target.T, exact, rtol=1e-3, atol=1e-3)
            assert new.transforms == learned[0].layers[0].transforms, "one input, one transform"


def test_it_starts_from_rotations_that_differ_by_group_and_seed() -> None:
    """Without a step what was not worse than rounding to nearest is the start itself."""
    problem = block_problem()
    (product,) = FlatQuant(epochs=0, diagonal=False, clip=False).learn(problem)[0].layers[0].transforms
    left, right = product.parts["left"], product.parts["right"]
    check_orthogonal(left)
    check_orthogonal(right)
    assert not torch.equal(left, right)


@pytest.mark.parametrize("clip", [True, False])
def test_clips_are_learned_on_request(clip: bool) -> None:
    learned = FlatQuant(epochs=1, clip=clip).learn(block_problem())
    assert all((layer.clip is not None) is clip for layer in learned[0].layers)


def test_options() -> None:
    assert FlatQuant().wanted == Wanted.RANGE and FlatQuant().text == "flatquant"
    assert FlatQuant(epochs=3, diagonal=False).text == "flatquant:epochs=3,diagonal=false"
    with pytest.raises(RecipeError, match="flatquant: epochs is at least 0, got -1"):
        FlatQuant(epochs=-1)
