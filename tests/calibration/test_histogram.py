"""The histogram of magnitudes against sorted numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microscale.calibration.histogram import FRACTION_BITS, NUM_BINS, HistogramSketch, bin_edges
from microscale.errors import CalibrationError

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0, 100))
def test_a_percentile_lies_beside_the_number_of_its_rank(values: list[float], percent: float) -> None:
    found = HistogramSketch.of(torch.tensor(values, dtype=torch.float32)).percentile(percent)
    magnitudes = np.sort(np.abs(np.asarray(values, dtype=np.float32)).astype(np.float64))
    rank = percent / 100 * len(values)
    exact = magnitudes[max(0, int(np.ceil(rank)) - 1)]
    assert abs(found - exact) <= max(exact, 2.0**-126) * 2.0**-FRACTION_BITS


@given(st.lists(finite, max_size=50), st.lists(finite, max_size=50))
def test_merging_is_exact(left: list[float], right: list[float]) -> None:
    one, two, both = (
        HistogramSketch.of(torch.tensor(part, dtype=torch.float32)) for part in (left, right, left + right)
    )
    merged = one.merge(two)
    assert torch.equal(merged.counts, both.counts)
    assert merged.maximum == both.maximum and int(merged.counts.sum()) == len(left) + len(right)


def test_percentiles_of_a_normal_distribution() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    sketch = HistogramSketch.of(values)
    for percent in (1, 50, 99, 99.9):
        exact = float(np.percentile(values.abs().numpy(), percent))
        assert sketch.percentile(percent) == pytest.approx(exact, rel=2e-3)  # interpolation gains a digit on a bin
    assert sketch.percentile(100) == float(values.abs().max())


def test_edges_are_what_the_counts_mean() -> None:
    edges = bin_edges()
    assert edges.shape == (NUM_BINS + 1,) and bool((edges[1:] > edges[:-1]).all()) and edges[-1] == 2.0**128
    at_edges = HistogramSketch.of(edges[:-1].to(torch.float32))
    assert bool((at_edges.counts == 1).all())
    below = HistogramSketch.of(torch.nextafter(edges[1:-1].to(torch.float32), torch.tensor(0.0)))
    assert bool((below.counts[:-1] == 1).all()) and below.counts[-1] == 0


def test_special_values() -> None:
    assert HistogramSketch.empty().percentile(50) == 0
    assert HistogramSketch.of(torch.zeros(9)).percentile(99) == 0
    for percent in (-1, 101, float("nan")):
        with pytest.raises(CalibrationError, match="between 0 and 100"):
            HistogramSketch.empty().percentile(percent)
