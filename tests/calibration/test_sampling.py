"""The sample that keeps extreme rows: exact on them, unbiased on the rest, whatever the batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microscale.calibration.sampling import TailSample


@given(num=st.integers(1, 80), cuts=st.lists(st.integers(0, 80), max_size=5), seed=st.integers(0, 99))
def test_the_largest_rows_are_all_there_and_weights_count_every_row(num: int, cuts: list[int], seed: int) -> None:
    rows = torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))
    sample = TailSample(num_largest=5, num_uniform=7, seed=seed)
    for low, high in pairwise([0, *sorted(min(cut, num) for cut in cuts), num]):
        sample.update(rows[low:high])
    found, weights = sample.result()
    assert found.shape == (min(num, 12), 3)
    assert float(weights.sum()) == pytest.approx(num)
    order = rows.abs().amax(1).argsort(descending=True)[:5]
    assert torch.equal(found[: min(num, 5)], rows[order])
    assert len({tuple(row.tolist()) for row in found}) == found.shape[0]  # no row twice
    whole = TailSample(num_largest=5, num_uniform=7, seed=seed)
    whole.update(rows)
    as_sets = [{tuple(row.tolist()) for row in one.result()[0]} for one in (sample, whole)]
    assert as_sets[0] == as_sets[1]


def test_sums_are_unbiased() -> None:
    rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(0)).exp()
    rows[100] = 1000.0
    exact = float(rows.sum())
    estimates: list[float] = []
    for seed in range(400):
        sample = TailSample(num_largest=10, num_uniform=40, seed=seed)
        for part in rows.split(70):
            sample.update(part)
        found, weights = sample.result()
        estimates.append(float(found.sum(1).to(torch.float64) @ weights))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 5 * error
    assert np.std(estimates) < 0.1 * exact  # the outlier is no matter of luck
