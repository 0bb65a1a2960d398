"""What the numbers of one tensor look like, against numpy and scipy."""

from __future__ import annotations

import pytest
import torch

from microscale.planning.tensor_facts import LargestValues, weight_facts


def test_moments_are_those_of_all_numbers() -> None:
    values = torch.randn(300, 48, generator=torch.Generator().manual_seed(0)).exp()
    values[:, 7] *= 30
    facts = weight_facts(values, "w")
    centred = values.double() - values.double().mean()
    std = float(centred.square().mean().sqrt())
    assert (facts.mean, facts.std) == (pytest.approx(float(values.mean()), rel=1e-4), pytest.approx(std, rel=1e-4))
    assert facts.skewness == pytest.approx(float((centred**3).mean()) / std**3, rel=1e-3)
    assert facts.kurtosis == pytest.approx(float((centred**4).mean()) / std**4, rel=1e-3)
    assert facts.outlier_channels == (7,) and facts.percentiles[100.0] == float(values.max())


def test_massive_values_have_a_place() -> None:
    values = torch.ones(2, 6, 5)
    values[1, 3, 2] = -5000.0
    largest = LargestValues(count=2)
    largest.update(values)
    one = largest.values[0]
    assert (one.row, one.channel, one.value) == (3, 2, -5000.0)
    found = weight_facts(values[1], "w").massive
    assert [(one.row, one.channel) for one in found] == [(3, 2)]


def test_zeros_and_constants() -> None:
    facts = weight_facts(torch.zeros(4, 32), "w")
    assert (facts.std, facts.kurtosis, facts.crest_mean, facts.massive) == (0.0, 0.0, 0.0, ())
    assert weight_facts(torch.full((32,), 2.0), "norm").skewness == 0.0


def test_a_place_that_all_windows_share_is_told_once() -> None:
    values = torch.ones(4, 6, 5)
    values[:, 0, 2] = torch.tensor([-5000.0, -6000.0, -4000.0, 3.0])
    largest = LargestValues(count=1)
    largest.update(values[:2])
    largest.update(values[2:])
    one = largest.values[0]
    assert (one.row, one.channel, one.value, one.window, one.windows) == (0, 2, -6000.0, 1, 4)
