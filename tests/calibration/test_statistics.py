"""Statistics of layer inputs against two-pass float64 formulas, however the tokens were batched."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microscale.calibration.statistics import InputStatistics, StatisticsCollector, Wanted
from microscale.errors import CalibrationError, DtypeError, NonFiniteError, ShapeError

FIELDS = [
    *("amax", "minimum", "maximum", "mean_abs", "mean", "std", "skewness", "kurtosis", "second_moment", "sample"),
    *("crest_mean", "crest_max"),
]


def skewed(rows: int, cols: int, seed: int = 0) -> Tensor:
    """Rows with an outlier channel, a far-off mean, and a skewed channel."""
    values = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    values[:, 0] *= 300
    values[:, 1] += 1000
    values[:, 2] = values[:, 2].exp()
    return values


def collect(batches: list[Tensor], **options: Any) -> InputStatistics:
    collector = StatisticsCollector(batches[0].shape[-1], **options)
    for batch in batches:
        collector.update(batch)
    return collector.result()


def oracle(values: Tensor, block_size: int) -> dict[str, np.ndarray]:
    x = values.to(torch.float64).numpy()
    mean, std = x.mean(0), x.std(0)
    z = (x - mean) / std
    crest = []
    for start in range(0, x.shape[1], block_size):
        block = x[:, start : start + block_size]
        crest.append(np.abs(block).max(1) / np.sqrt((block**2).mean(1)))
    return {
        "amax": np.abs(x).max(0),
        "minimum": x.min(0),
        "maximum": x.max(0),
        "mean_abs": np.abs(x).mean(0),
        "mean": mean,
        "std": std,
        "skewness": (z**3).mean(0),
        "kurtosis": (z**4).mean(0),
        "second_moment": x.T @ x / x.shape[0],
        "crest_mean": np.stack(crest).mean(1),
        "crest_max": np.stack(crest).max(1),
    }


@pytest.mark.parametrize("cols", [3, 40, 64])
@pytest.mark.parametrize("block_cols", [1, 7, 256])
def test_everything_equals_the_two_pass_formulas(cols: int, block_cols: int) -> None:
    values = skewed(999, cols)
    found = collect(list(values.split([1, 500, 33, 465])), block_size=16, block_cols=block_cols)
    expected = oracle(values, 16)
    assert found.num_tokens == 999 and found.cols == cols
    for name, value in expected.items():
        tolerance = 1e-4 * np.abs(value).max() if name == "second_moment" else 1e-6 * np.abs(value).max()
        np.testing.assert_allclose(getattr(found, name).numpy(), value, rtol=3e-6, atol=tolerance, err_msg=name)


def test_second_moment_is_symmetric_and_within_the_bound_of_float32() -> None:
    values = skewed(2000, 70, seed=1)
    found = collect(list(values.split(300)), wanted=Wanted.SECOND_MOMENT, block_cols=32).require("second_moment")
    x = values.to(torch.float64)
    exact = x.T @ x / 2000
    bound = 2000 * 2.0**-24 * (x.abs().T @ x.abs() / 2000)
    assert torch.equal(found, found.T)
    assert bool(((found - exact).abs() <= bound).all())


def test_moments_survive_a_mean_far_from_zero() -> None:
    values = torch.randn(4000, 2, generator=torch.Generator().manual_seed(2)) + 1e4
    found = collect(list(values.split(1)), wanted=Wanted.MOMENTS)  # one row at a time: Welford's case
    x = values.to(torch.float64)
    std = x.std(0, correction=0)
    torch.testing.assert_close(found.require("std").to(torch.float64), std, rtol=1e-6, atol=0)
    kurtosis = ((x - x.mean(0)) / std).pow(4).mean(0)
    torch.testing.assert_close(found.require("kurtosis").to(torch.float64), kurtosis, rtol=1e-6, atol=0)


@given(
    cuts=st.lists(st.integers(0, 60), max_size=6),
    seed=st.integers(0, 1000),
    wanted=st.sampled_from([Wanted.ALL, Wanted.MOMENTS | Wanted.CREST, Wanted.SAMPLE]),
)
def test_batching_does_not_matter(cuts: list[int], seed: int, wanted: Wanted) -> None:
    values = skewed(60, 5, seed)
    edges = [0, *sorted(cuts), 60]
    parts = [values[a:b] for a, b in itertools.pairwise(edges)]
    options: dict[str, Any] = {"wanted": wanted, "block_size": 2, "sample_rows": 7, "seed": seed}
    assert_same(collect(parts, **options), collect([values], **options))


@given(cut=st.integers(0, 60), seed=st.integers(0, 1000))
def test_merging_equals_one_pass(cut: int, seed: int) -> None:
    values = skewed(60, 5, seed)
    options: dict[str, Any] = {"block_size": 2, "sample_rows": 100}  # large enough to keep every row
    left, right = StatisticsCollector(5, **options), StatisticsCollector(5, block_cols=2, **options)
    left.update(values[:cut])
    right.update(values[cut:])
    before = right.result()
    left.merge(right)
    assert_same(left.result(), collect([values], **options))
    assert_same(right.result(), before)


def assert_same(first: InputStatistics, second: InputStatistics) -> None:
    assert first.num_tokens == second.num_tokens
    for name in FIELDS:
        one, two = getattr(first, name), getattr(second, name)
        assert (one is None) == (two is None)
        if one is not None:
            one, two = one.to(torch.float32), two.to(torch.float32)  # a sample keeps the dtype of its inputs
            largest = float(two.abs().max()) if two.numel() else 0.0
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * largest, msg=name)
    if first.histogram is not None and second.histogram is not None:
        assert torch.equal(first.histogram.counts, second.histogram.counts)
        assert first.histogram.maximum == second.histogram.maximum


def test_leading_axes_are_tokens() -> None:
    values = torch.randn(2, 3, 4, 8)
    assert_same(collect([values]), collect([values.reshape(24, 8)]))
    assert collect([values[0, 0, 0]]).num_tokens == 1


def test_only_what_is_wanted_is_there() -> None:
    found = collect([torch.ones(3, 4)], wanted=Wanted.MEAN_ABS)
    missing = [name for name in FIELDS if getattr(found, name) is None]
    assert missing == FIELDS[4:]
    assert found.histogram is None
    with pytest.raises(CalibrationError, match="statistics of the layer lack second_moment"):
        found.require("second_moment")


def test_sample_is_seeded_uniform_and_keeps_raw_rows() -> None:
    values = torch.arange(1000, dtype=torch.bfloat16).reshape(-1, 1)  # bfloat16 rows come back as they were
    hits = np.zeros(1000)
    for seed in range(300):
        found = collect([values], wanted=Wanted.SAMPLE, sample_rows=50, seed=seed).require("sample")
        assert found.shape == (50, 1) and found.dtype == torch.bfloat16
        assert bool((found[1:] >= found[:-1]).all())  # in the order of the text
        positions = np.searchsorted(values.flatten().float().numpy(), found.flatten().float().numpy())
        hits[positions] += 1
    first, second = (hits[half].sum() for half in (slice(0, 500), slice(500, 1000)))
    assert abs(first - second) < 5 * np.sqrt(300 * 50)
    again = [collect([values], wanted=Wanted.SAMPLE, sample_rows=50, seed=seed).require("sample") for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])


def test_merged_samples_are_drawn_from_both() -> None:
    left, right = (StatisticsCollector(1, wanted=Wanted.SAMPLE, sample_rows=100, seed=seed) for seed in (1, 2))
    left.update(torch.zeros(3000, 1))
    right.update(torch.ones(1000, 1))
    left.merge(right)
    share = float(left.result().require("sample").mean())
    assert 0.25 - 5 * 0.0433 < share < 0.25 + 5 * 0.0433


def test_constant_and_zero_channels() -> None:
    values = torch.full((777, 4), 0.1)
    values[:, 1] = 0
    values[:, 2] = -3e38
    found = collect(list(values.split(100)), wanted=Wanted.MOMENTS | Wanted.CREST, block_size=2)
    for name in ("std", "skewness", "kurtosis"):
        assert found.require(name).tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(found.require("mean"), values[0])
    torch.testing.assert_close(found.require("crest_max"), torch.tensor([2**0.5, 2**0.5]))


def test_zero_blocks_have_no_crest_factor() -> None:
    values = torch.tensor([[0.0, 0.0, 0.0, 0.0, 7.0], [1.0, 1.0, 0.0, 0.0, 1e-45]])
    found = collect([values], wanted=Wanted.CREST, block_size=2)
    assert found.require("crest_mean").tolist() == [1, 0, 1]
    assert found.require("crest_max").tolist() == [1, 0, 1]


def test_no_token_gives_zeros() -> None:
    found = collect([torch.zeros(0, 5)])
    assert found.num_tokens == 0 and found.require("sample").shape == (0, 5)
    for name in FIELDS:
        assert not getattr(found, name).any() and bool(torch.isfinite(getattr(found, name)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert_same(collect([values.T[:, ::2]]), collect([values.T[:, ::2].contiguous().to(torch.float32)]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_non_finite_inputs_are_refused_whole(bad: float) -> None:
    values = torch.randn(50, 6, dtype=torch.float64)
    collector = StatisticsCollector(6, name="model.layers.3.mlp.down_proj")
    collector.update(values)
    before = collector.result()
    broken = values.clone()
    broken[41, 5] = bad
    with pytest.raises(NonFiniteError, match=r"input of model\.layers\.3\.mlp\.down_proj holds 1 NaN .* channel 5"):
        collector.update(broken)
    assert_same(collector.result(), before)


def test_an_overflow_of_the_second_moment_is_no_silent_infinity() -> None:
    collector = StatisticsCollector(2, wanted=Wanted.SECOND_MOMENT, name="fc")
    collector.update(torch.full((3, 2), 1e20))
    with pytest.raises(NonFiniteError, match=r"inputs of fc up to 1e\+20 overflow"):
        collector.result()


def test_inputs_are_not_changed() -> None:
    values = skewed(30, 8)
    before = values.clone()
    collect([values])
    assert torch.equal(values, before)


def test_bad_calls() -> None:
    collector = StatisticsCollector(4, name="fc1")
    with pytest.raises(ShapeError, match=r"fc1 must end in 4 channels, got \[2, 5\]"):
        collector.update(torch.zeros(2, 5))
    with pytest.raises(ShapeError):
        collector.update(torch.tensor(1.0))
    with pytest.raises(DtypeError, match=r"fc1 must be float, got torch.int64"):
        collector.update(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(CalibrationError, match="of the same collector"):
        collector.merge(collector)
    with pytest.raises(CalibrationError, match="cannot be merged"):
        collector.merge(StatisticsCollector(4, wanted=Wanted.MOMENTS))
    with pytest.raises(ShapeError, match="block_size of the statistics of the layer must be positive, got 0"):
        StatisticsCollector(4, block_size=0)
