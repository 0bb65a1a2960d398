"""Each accumulator by itself against numpy and scipy in float64: batches, merges, empty batches, special values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from method_problems import tensors_of
from microscale.calibration.accumulators import Crest, Histogram, MeanAbs, Moments, Reservoir, SecondMoment
from small_models import same_bits

CPU = torch.device("cpu")


def rows_of(count: int, cols: int, seed: int = 0) -> Tensor:
    values = torch.randn(count, cols, generator=torch.Generator().manual_seed(seed))
    return values * torch.linspace(0.1, 30, cols) + torch.arange(cols)


def central(values: np.ndarray, order: int) -> np.ndarray:
    """Return the sum of (x - mean)^order by the definition."""
    return ((values - values.mean(0)) ** order).sum(0)


def check_moments(found: Moments, values: Tensor) -> None:
    wide = values.to(torch.float64).numpy()
    assert found.count == len(wide)
    np.testing.assert_allclose(found.mean.numpy(), wide.mean(0), rtol=1e-12)
    for order, sums in ((2, found.m2), (3, found.m3), (4, found.m4)):
        expected = central(wide, order)
        np.testing.assert_allclose(
            sums.numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(wide).max() ** order * len(wide)
        )


def test_moments_by_hand() -> None:
    moments = Moments(2, CPU)
    moments.update(torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]]))  # mean 3: -2, -1, 3
    assert moments.mean.tolist() == [3.0, 5.0] and moments.m2.tolist() == [14.0, 0.0]
    assert moments.m3.tolist() == [18.0, 0.0] and moments.m4.tolist() == [98.0, 0.0]


@given(cut=st.integers(1, 39), seed=st.integers(0, 99))
def test_moments_of_two_parts_are_those_of_all(cut: int, seed: int) -> None:
    values = rows_of(40, 3, seed)
    whole, first, second = (Moments(3, CPU) for _ in range(3))
    whole.update(values[:cut])
    whole.update(values[cut:])
    first.update(values[:cut])
    second.update(values[cut:])
    first.merge(second)
    check_moments(whole, values)
    check_moments(first, values)


def test_a_merge_with_nothing_changes_nothing() -> None:
    moments = Moments(3, CPU)
    moments.merge(Moments(3, CPU))
    assert moments.count == 0 and not moments.mean.any()
    values = rows_of(5, 3)
    moments.update(values)
    moments.merge(Moments(3, CPU))
    check_moments(moments, values)
    empty = Moments(3, CPU)
    empty.merge(moments)
    check_moments(empty, values)


def test_magnitudes_are_summed() -> None:
    one, other = MeanAbs(2, CPU), MeanAbs(2, CPU)
    one.update(torch.tensor([[1.0, -2.0], [-0.0, 0.5]]))
    other.update(torch.tensor([[-3.0, 0.25]]))
    one.merge(other)
    assert one.total.tolist() == [4.0, 2.75] and one.total.dtype == torch.float64


def test_batches_are_summed_in_float64() -> None:
    """In float32 a sum of 2^24 ones would stop to grow."""
    found = MeanAbs(1, CPU)
    found.total.fill_(2.0**24)
    found.update(torch.ones(1, 1))
    assert found.total.item() == 2.0**24 + 1


@pytest.mark.parametrize("block_cols", [1, 3, 4, 99])
def test_the_second_moment(block_cols: int) -> None:
    values = torch.randint(-8, 9, (50, 10), generator=torch.Generator().manual_seed(0)).to(torch.float32)
    moment, other = SecondMoment(10, CPU, block_cols), SecondMoment(10, CPU, 7)
    moment.update(values[:20].to(torch.bfloat16))
    moment.update(values[20:20])
    other.update(values[20:])
    moment.merge(other)
    found = moment.mean(1)
    exact = values.numpy().astype(np.int64)
    assert np.array_equal(found.numpy(), exact.T @ exact), "whole numbers: exact in float32"
    torch.testing.assert_close(moment.mean(50) * 50, found)
    assert torch.equal(SecondMoment(3, CPU, 2).mean(0), torch.zeros(3, 3)), "without a token it is zero, not NaN"


@pytest.mark.parametrize("size", [0, 1, 7, 50])
def test_a_sample_does_not_depend_on_batches(size: int) -> None:
    values = torch.arange(40.0).unsqueeze(1)
    found: list[list[float]] = []
    for cuts in ([40], [1] * 40, [3, 0, 30, 7]):
        sample = Reservoir(1, CPU, size, seed=5)
        for part in values.split(cuts):
            sample.update(part)
        found.append(sample.rows.flatten().tolist())
    assert found[0] == found[1] == found[2] == sorted(found[0])
    keys = np.random.default_rng(5).random(40)
    assert set(found[0]) == set(np.argsort(-keys)[: min(size, 40)].tolist()), "the largest keys stay"


def test_a_merged_sample_holds_the_largest_keys_of_both() -> None:
    one, other = Reservoir(1, CPU, 3, seed=0), Reservoir(1, CPU, 3, seed=1)
    one.offer(np.array([0.1, 0.9, 0.5]), torch.tensor([[1.0], [2.0], [3.0]]))
    other.offer(np.array([0.6, 0.2]), torch.tensor([[4.0], [5.0]]))
    one.merge(other)
    assert one.rows.flatten().tolist() == [2.0, 3.0, 4.0] and one.keys.tolist() == [0.9, 0.5, 0.6]
    before = one.rows.clone()
    one.offer(np.array([0.5]), torch.tensor([[9.0]]))  # a tie stays out
    assert torch.equal(one.rows, before)


@pytest.mark.parametrize(
    ("block", "crest"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0),
        ([0.0, 0.0, 0.0, -5.0], 2.0),  # one of four: sqrt(4)
        ([3.0, 4.0, 0.0, 0.0], 4 / 2.5),
        ([3e38, 3e38, 3e38, 3e38], 1.0),  # squares would overflow
        ([1e-45, 0.0, 0.0, 0.0], 2.0),  # and here vanish
        ([0.0, -0.0, 0.0, 0.0], 0.0),
    ],
)
def test_crest_factors(block: list[float], crest: float) -> None:
    found = Crest(4, CPU, 4)
    found.update(torch.tensor([block]))
    assert found.largest.tolist() == pytest.approx([crest], rel=1e-6)
    assert found.total.tolist() == pytest.approx([crest], rel=1e-6)
    assert found.count.tolist() == [int(crest > 0)], "a block of zeros has none"


@pytest.mark.parametrize(("cols", "size"), [(8, 4), (10, 4), (3, 4), (5, 1)])
def test_crest_factors_of_ragged_blocks(cols: int, size: int) -> None:
    values = rows_of(30, cols)
    one, other = Crest(cols, CPU, size), Crest(cols, CPU, size)
    one.update(values[:11])
    other.update(values[11:])
    one.merge(other)
    wide = values.to(torch.float64).numpy()
    blocks = [wide[:, i : i + size] for i in range(0, cols, size)]
    expected = np.stack([np.abs(block).max(1) / np.sqrt((block**2).mean(1)) for block in blocks])
    np.testing.assert_allclose(one.total.numpy() / 30, expected.mean(1), rtol=1e-6)
    np.testing.assert_allclose(one.largest.numpy(), expected.max(1), rtol=1e-6)
    assert one.count.tolist() == [30] * len(blocks)


def test_histograms_of_parts_are_that_of_all() -> None:
    values = rows_of(64, 4)
    one, other, whole = Histogram(CPU), Histogram(CPU), Histogram(CPU)
    one.update(values[:9])
    other.update(values[9:])
    whole.update(values)
    one.merge(other)
    assert torch.equal(one.sketch.counts, whole.sketch.counts) and int(whole.sketch.counts.sum()) == values.numel()
    assert one.sketch.maximum == whole.sketch.maximum == float(values.abs().max())


MAKERS: dict[str, Callable[[], Any]] = {
    "mean_abs": lambda: MeanAbs(6, CPU),
    "second_moment": lambda: SecondMoment(6, CPU, 4),
    "reservoir": lambda: Reservoir(6, CPU, 4, 0),
    "crest": lambda: Crest(6, CPU, 4),
    "histogram": lambda: Histogram(CPU),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_without_rows_changes_nothing(name: str) -> None:
    found, plain = MAKERS[name](), MAKERS[name]()
    for each in (found, plain):
        each.update(rows_of(5, 6))
    found.update(torch.zeros(0, 6))
    one, other = tensors_of(vars(found)), tensors_of(vars(plain))
    assert one and all(same_bits(*pair) for pair in zip(one, other, strict=True))
