"""QuaRot: a rotation by its seed, and heads that turn each by another."""

from __future__ import annotations

import torch

from method_problems import check_orthogonal, rotation_problem
from microscale.algorithms.quarot import QuaRot
from microscale.algorithms.rotation import start_rotation
from small_models import same_bits


def test_the_seed_makes_the_rotation() -> None:
    problem = rotation_problem()
    found = QuaRot(seed=3).rotation(problem)
    check_orthogonal(found)
    assert same_bits(found, start_rotation(64, 3)) and same_bits(found, QuaRot(seed=3).rotation(problem))
    assert not torch.equal(found, QuaRot(seed=4).rotation(problem))


def test_heads_of_each_block_turn_by_another_rotation() -> None:
    turns = [QuaRot(seed=3).head_rotation(16, index) for index in range(3)]
    for turn in turns:
        assert turn is not None and turn.shape == (16, 16)
        check_orthogonal(turn)
    first, second, third = (turn for turn in turns if turn is not None)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert not torch.equal(first, start_rotation(16, 3)), "nor by that of the stream"
    assert QuaRot(values=False).head_rotation(16, 0) is None


def test_it_needs_no_text_and_leaves_nothing_online() -> None:
    step = QuaRot()
    assert (step.is_learned, step.is_online, step.wanted, step.text) == (False, False, None, "quarot")
    assert "outlier channels" in str(step.segment_obstacle)
