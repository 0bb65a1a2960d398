"""BlockRotation: blocks turn each on their own, and what does not fill a block turns too."""

from __future__ import annotations

import pytest
import torch

from method_problems import check_orthogonal, rotation_problem
from microscale.algorithms.block_rotation import BlockRotation
from microscale.algorithms.rotation import start_rotation
from microscale.errors import RecipeError
from small_models import same_bits


def test_channels_of_other_blocks_stay_apart() -> None:
    found = BlockRotation(size=16, seed=3).rotation(rotation_problem())
    check_orthogonal(found)
    blocks = found.reshape(4, 16, 4, 16).transpose(1, 2)
    for row in range(4):
        for col in range(4):
            assert same_bits(blocks[row, col], start_rotation(16, 3)) if row == col else not blocks[row, col].any()


def test_a_width_that_is_no_multiple_has_a_smaller_last_block() -> None:
    turn = BlockRotation(size=32, seed=1).head_rotation(40, 0)
    assert turn is not None and turn.shape == (40, 40)
    check_orthogonal(turn)
    assert not turn[:32, 32:].any() and not turn[32:, :32].any() and bool((turn[32:, 32:] != 0).all())
    assert BlockRotation(values=False).head_rotation(40, 0) is None


def test_only_blocks_of_the_format_or_smaller_cross_no_block() -> None:
    assert not BlockRotation(size=32).crosses(32) and not BlockRotation(size=16).crosses(32)
    assert BlockRotation(size=64).crosses(32)


@pytest.mark.parametrize("size", [0, 1, 24, -2])
def test_a_size_that_no_hadamard_matrix_has_is_refused(size: int) -> None:
    with pytest.raises(RecipeError, match="power of two"):
        BlockRotation(size=size)


def test_it_gathers_less_than_a_rotation_of_all_channels() -> None:
    """An outlier stays in its block: the others are as small as before."""
    stream = torch.full((64,), 0.01, dtype=torch.float64)
    stream[5] = 100.0
    turned = stream @ BlockRotation(size=32).rotation(rotation_problem())
    assert float(turned[32:].abs().max()) < 0.1 < 10 < float(turned[:32].abs().max())
