"""The straight-through estimator: the value is that of the rounding, the gradient passes."""

from __future__ import annotations

import torch

from microscale.kernels.straight_through import straight_through
from small_models import same_bits


def test_the_value_is_the_rounded_one_and_the_gradient_passes() -> None:
    values = torch.tensor([0.4, -1.6, float("nan")], requires_grad=True)
    rounded = straight_through(values, torch.round)
    assert same_bits(rounded.detach(), torch.tensor([0.0, -2.0, float("nan")]))
    rounded.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert values.grad is not None and values.grad.tolist() == [1.0, 2.0, 3.0]


def test_where_nothing_is_recorded_the_rounding_alone_runs() -> None:
    seen: list[torch.Tensor] = []

    def rounding(values: torch.Tensor) -> torch.Tensor:
        seen.append(values)
        return values

    plain, asked = torch.ones(2), torch.ones(2, requires_grad=True)
    assert straight_through(plain, rounding) is plain
    with torch.no_grad():
        assert straight_through(asked, rounding) is asked
    assert seen[0] is plain and seen[1] is asked
