"""BATQuant: a matrix for each block, one for all, or a product with a part that all share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from method_problems import block_problem, random
from microscale.algorithms.batquant import BatQuant
from microscale.algorithms.block_error import block_error
from microscale.algorithms.flatquant import FlatQuant
from microscale.calibration.statistics import Wanted
from microscale.errors import RecipeError
from microscale.kernels.transform import apply_transforms, hadamard_matrix


@pytest.mark.parametrize("mode", ["block", "shared", "gpk"])
def test_modes_of_block_transforms(mode: str) -> None:
    problem = block_problem()
    learned = BatQuant(mode=mode, epochs=4).learn(problem)
    (transform,) = learned[0].layers[0].transforms
    matrix = transform.parts["matrix"]
    assert str(transform.spec) == ("block(32,shared)" if mode == "shared" else "block(32)")
    assert not torch.allclose(matrix[0], matrix[0].T), "it has left its start"
    if mode == "gpk":  # private[k] (x) shared: 4x4 and 8x8 parts of one rank
        parts = matrix.reshape(-1, 4, 8, 4, 8).permute(0, 1, 3, 2, 4).reshape(-1, 64)
        assert int(torch.linalg.matrix_rank(parts, rtol=1e-4)) == 1
    assert block_error(problem, learned) < block_error(problem, problem.groups)


def test_widths_that_no_block_divides() -> None:
    """40 = 8 * 5 takes blocks of 8; a Kronecker product takes any width."""
    problem = block_problem(width=40)
    for learning in (BatQuant(epochs=2), FlatQuant(epochs=2)):
        learned = learning.learn(problem)
        assert block_error(problem, learned) <= block_error(problem, problem.groups)


@pytest.mark.parametrize(("mode", "count"), [("block", 2), ("shared", 1), ("gpk", 2)])
def test_every_mode_starts_from_a_hadamard_matrix(mode: str, count: int) -> None:
    """H_4 (x) H_8 is H_32, so that the modes begin alike."""
    (transform,) = BatQuant(mode=mode, epochs=0, clip=False).learn(block_problem())[0].layers[0].transforms
    expected = hadamard_matrix(32).repeat(count, 1, 1)
    torch.testing.assert_close(transform.parts["matrix"], expected)


@pytest.mark.parametrize("mode", ["block", "gpk"])
def test_what_is_learned_leaves_the_function_as_it_was(mode: str) -> None:
    problem = block_problem()
    learned = BatQuant(mode=mode, epochs=2).learn(problem)
    x = random(5, 64, seed=9)
    for old, new in zip(problem.groups[0].layers, learned[0].layers, strict=True):
        assert new.transforms and new.clip is not None and torch.equal(new.weight, old.weight)
        exact = x @ old.weight.T
        torch.testing.assert_close(apply_transforms(x, new.transforms) @ new.target.T, exact, rtol=1e-3, atol=1e-3)


def test_an_odd_width_is_left_as_it_is() -> None:
    problem = block_problem(width=33)
    learned = BatQuant(epochs=1).learn(problem)
    assert not learned[0].layers[0].transforms and learned[0] is problem.groups[0]
    assert [str(transform.spec) for transform in learned[1].layers[0].transforms] in ([], ["block(32)"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "some"}, "batquant: mode is one of block, shared, gpk, got 'some'"),
        ({"size": 24}, "batquant: epochs >= 0, size 16, 32, 64 or 128; got 5 and 24"),
        ({"epochs": -1}, "got -1 and 32"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        BatQuant(**options)
    assert BatQuant().wanted == Wanted.RANGE
