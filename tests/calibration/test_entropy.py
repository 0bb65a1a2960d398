"""Entropy calibration against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microscale.calibration.entropy import NUM_BINS, LinearHistogram, clipped_divergence, entropy_threshold
from microscale.errors import CalibrationError


def test_divergence_of_two_levels_by_hand() -> None:
    """The example of the talk: 8 bins, 2 levels; Q = [2, 0, 2, 2, 4, 4, 4, 4] of 22."""
    counts = torch.tensor([1, 0, 2, 3, 5, 3, 1, 7])
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    expected = sum(p / 22 * math.log(p / q) for p, q in [(1, 2), (2, 2), (3, 2), (5, 4), (3, 4), (1, 4), (7, 4)])
    assert clipped_divergence(counts, groups) == pytest.approx(expected, rel=1e-12)


def test_divergence_with_clipped_numbers_by_hand() -> None:
    """Bins 1 2 | 4 2 kept, 3 clipped: P = [1, 2, 4, 5] / 12, Q = [1.5, 1.5, 3, 3] / 9."""
    counts = torch.tensor([1, 2, 4, 2, 2, 1])
    expected = sum(p / 12 * math.log(p / 12 / (q / 9)) for p, q in [(1, 1.5), (2, 1.5), (4, 3), (5, 3)])
    assert clipped_divergence(counts, torch.tensor([0, 0, 1, 1])) == pytest.approx(expected, rel=1e-12)


def test_divergence_is_infinite_where_clipped_numbers_fall_into_an_empty_bin() -> None:
    assert clipped_divergence(torch.tensor([3, 0, 1]), torch.tensor([0, 1])) == math.inf
    assert clipped_divergence(torch.tensor([0, 0, 1]), torch.tensor([0, 1])) == math.inf
    assert clipped_divergence(torch.tensor([3, 0]), torch.tensor([0, 1])) == 0


def steps(num: int) -> object:
    def quantize(values: Tensor, amax: Tensor) -> Tensor:
        step = amax / num
        return (values / step).round().clamp(max=num) * step

    return quantize


def test_threshold_equals_a_search_by_hand() -> None:
    """Every range of a small histogram tried one by one."""
    counts = torch.tensor([40, 35, 32, 25, 20, 14, 9, 6, 4, 2, 1, 0, 0, 0, 0, 1])
    quantize = steps(3)
    divergences: dict[int, float] = {}
    for stop in range(1, 17):
        centres = torch.arange(stop) + 0.5
        groups = (centres / (stop / 3)).round().clamp(max=3).to(torch.int64)
        if counts[stop - 1] and len(groups.unique()) < stop:
            divergences[stop] = clipped_divergence(counts, groups)
    best = max(stop for stop in divergences if divergences[stop] == min(divergences.values()))
    assert entropy_threshold(counts, 0.25, quantize) == best * 0.25  # type: ignore[arg-type]
    assert best < 16


def test_a_range_without_visible_rounding_is_not_taken() -> None:
    """With one level for each bin the divergence would be 0 at once."""
    counts = torch.tensor([9, 8, 7, 6, 5, 4, 3, 2])
    assert entropy_threshold(counts, 1.0, lambda values, _: values) == 8


def test_uniform_numbers_are_not_clipped_and_a_lone_outlier_is() -> None:
    uniform = torch.full((NUM_BINS,), 100)
    assert entropy_threshold(uniform, 1.0, steps(8)) > 0.95 * NUM_BINS  # type: ignore[arg-type]
    normal = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    normal[7] = 60.0
    histogram = LinearHistogram()
    histogram.update(normal)
    assert 2.5 < entropy_threshold(histogram.counts, histogram.width, steps(7)) < 6  # type: ignore[arg-type]


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), max_size=30), st.integers(0, 30))
def test_histogram_does_not_depend_on_batches(values: list[float], cut: int) -> None:
    whole, parts = LinearHistogram(), LinearHistogram()
    whole.update(torch.tensor(values))
    parts.update(torch.tensor(values[:cut]))
    parts.update(torch.tensor(values[cut:]))
    assert torch.equal(whole.counts, parts.counts) and whole.width == parts.width
    assert int(whole.counts.sum()) == sum(value != 0 for value in values)
    if whole.exponent is not None:
        largest = max(map(abs, values))
        assert whole.width * NUM_BINS / 2 <= largest < whole.width * NUM_BINS


def test_no_numbers() -> None:
    with pytest.raises(CalibrationError, match="not zero"):
        entropy_threshold(torch.zeros(8, dtype=torch.int64), 1.0, steps(2))  # type: ignore[arg-type]
