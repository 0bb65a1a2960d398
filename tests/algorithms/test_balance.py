"""Balance: the scale by hand, that one huge token does not decide, and that it lowers the error behind a rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from method_problems import COLS, group_problem, layer_problem, random
from microscale.algorithms.balance import CAP, POWERS, Balance, balancing_scale, token_shares
from microscale.algorithms.pipeline import parse_method
from microscale.errors import RecipeError
from microscale.kernels import fake_quantize
from microscale.kernels.transform import block_product, hadamard_matrix

UNEVEN = torch.exp(random(COLS, seed=5))
"""Sizes of channels that differ by a factor of ten or so."""


def test_the_scale_by_hand() -> None:
    """Inputs 1, 4, 16 and weights 4, 4, 1: the roots of their ratios are 1/2, 1 and 4, with the mean 2^(1/3)."""
    inputs, weights = torch.tensor([1.0, 4.0, 16.0, 0.0, 3.0]), torch.tensor([4.0, 4.0, 1.0, 2.0, 0.0])
    assert balancing_scale(inputs, weights, 0.5).tolist() == [0.5, 1.0, 4.0, 1.0, 1.0]
    assert balancing_scale(inputs * 256, weights, 0.5).tolist() == [0.5, 1.0, 4.0, 1.0, 1.0]
    assert balancing_scale(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]


def test_a_token_counts_for_eight_medians_at_most() -> None:
    rows = torch.ones(5, 4)
    rows[0] = 1e4
    shares = token_shares(rows).flatten()
    assert shares[1:].tolist() == [1.0] * 4
    assert float((rows[0] * shares[0]).square().sum()) == pytest.approx(CAP * 4.0)
    assert bool(torch.isfinite(token_shares(torch.zeros(3, 4))).all())


def error(scale: Tensor, rows: Tensor, weight: Tensor, *, size: int) -> float:
    """Return the error of the outputs with both sides scaled, rotated and rounded."""
    fmt = layer_problem().format

    def rounded(values: Tensor) -> Tensor:
        return fake_quantize(block_product(values, hadamard_matrix(size, values).unsqueeze(0)), fmt)

    return float((rounded(rows / scale) @ rounded(weight * scale).T - rows @ weight.T).square().mean())


def test_uneven_channels_that_meet_like_weights_are_balanced() -> None:
    """The larger a channel the smaller its weights: behind a rotation, dividing by the root of the ratio is best."""
    rows = random(192, COLS, seed=2) * UNEVEN
    layer = layer_problem(inputs=rows)
    found = Balance().input_scale(group_problem(layer))
    before, after = (error(one, rows, layer.weight, size=32) for one in (torch.ones(COLS), found))
    assert after < 0.8 * before
    expected = [balancing_scale(rows.square().mean(0).sqrt(), layer.weight.square().mean(0).sqrt(), p) for p in POWERS]
    assert min(float((found / one).log().std()) for one in expected) < 0.1


def test_a_huge_token_does_not_decide() -> None:
    """A token like the first of a window of a trained model: a thousand times the others, in two channels."""
    rows = random(192, COLS, seed=2) * UNEVEN
    usual = Balance().input_scale(group_problem(layer_problem(inputs=rows)))
    rows[0, 7:9] = 3000.0
    beside = Balance().input_scale(group_problem(layer_problem(inputs=rows)))
    others = torch.ones(COLS, dtype=torch.bool)
    others[7:9] = False
    ratio = (beside / usual)[others].log2()
    assert float(ratio.std()) < 0.2


def test_what_gains_nothing_stays_to_the_bit() -> None:
    layer = layer_problem(activations=None, inputs=random(192, COLS, seed=3))
    grid = fake_quantize(layer.weight, layer.format)  # rounds to itself: no scale can be better
    even = group_problem(layer_problem(activations=None, inputs=random(192, COLS, seed=3)))
    exact = group_problem(*(type(one)(**{**vars_of(one), "weight": grid}) for one in even.layers))
    assert torch.equal(Balance(size=1).input_scale(exact), torch.ones(COLS))


def vars_of(record: object) -> dict[str, object]:
    """Return the fields of a record."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}  # type: ignore[attr-defined]


def test_a_size_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(RecipeError, match="size is a power of two, got 24"):
        parse_method("balance:size=24")
