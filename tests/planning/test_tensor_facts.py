"""What the numbers of one tensor look like, against numpy and scipy."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from microscale.errors import NonFiniteError
from microscale.planning.tensor_facts import (
    NUM_BINS,
    LargestValues,
    TensorObserver,
    noise_and_power,
    pieces_of,
    weight_facts,
)


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


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 9))
def test_moments_are_those_of_scipy(rows: int, cols: int, seed: int) -> None:
    values = normal(rows, cols, seed=seed) ** 3 + seed
    facts, flat = weight_facts(values, "w"), values.double().numpy().ravel()
    assert (facts.rows, facts.num_channels) == (rows, cols)
    assert (facts.minimum, facts.maximum) == (flat.min(), flat.max())
    assert facts.mean == pytest.approx(flat.mean(), rel=1e-4, abs=1e-5)
    assert facts.std == pytest.approx(flat.std(), rel=1e-3, abs=1e-5)
    if flat.size > 1:
        assert facts.skewness == pytest.approx(stats.skew(flat), rel=1e-2, abs=1e-2)
        assert facts.kurtosis == pytest.approx(stats.kurtosis(flat, fisher=False), rel=1e-2, abs=1e-2)


def test_crest_factors_by_hand() -> None:
    """Blocks of 32 channels: one number of 4 among zeros has a crest factor of sqrt(32), equal numbers of 1."""
    values = torch.ones(2, 64)
    values[:, :32] = 0
    values[:, 3] = 4
    facts = weight_facts(values, "w")
    assert facts.crest_max == pytest.approx(math.sqrt(32))
    assert facts.crest_mean == pytest.approx((1 + math.sqrt(32)) / 2)


@pytest.mark.parametrize(("size", "outliers"), [(4.999, ()), (5.0, (2,)), (50.0, (2,))])
def test_outlier_channels_begin_at_five_medians(size: float, outliers: tuple[int, ...]) -> None:
    values = torch.ones(4, 7)
    values[:, 2] = size
    facts = weight_facts(values, "w")
    assert facts.outlier_channels == outliers and facts.outlier_ratio == pytest.approx(size)


def test_massive_values_begin_at_a_thousand_medians() -> None:
    """The median comes from a histogram, which is wrong by less than 1 / 32."""
    values = torch.ones(4, 8)
    values[0, 0], values[1, 1], values[2, 2] = 960.0, -1040.0, 2000.0
    found = weight_facts(values, "w").massive
    assert [(one.row, one.channel, one.value, one.window, one.windows) for one in found] == [
        (2, 2, 2000.0, None, 1),
        (1, 1, -1040.0, None, 1),
    ]


def test_channels_are_the_largest_of_runs() -> None:
    """400 channels in runs of 3: 134 of them, the last of one channel."""
    values = torch.arange(400.0).repeat(2, 1) * torch.tensor([[1.0], [-2.0]])
    channels = weight_facts(values, "w").channels
    assert len(channels) == 134 and channels[:2] == (4.0, 10.0) and channels[-1] == 798.0
    assert weight_facts(values[:, :5], "w").channels == (0.0, 2.0, 4.0, 6.0, 8.0)


def test_histograms_are_shares_of_the_blocks_largest() -> None:
    """81 bins from -1 to 1: the largest of a block is in the last or first, zeros in the middle one."""
    values = torch.zeros(3, 64)
    values[0, 0], values[0, 1], values[1, 40] = 3.0, -1.5, -7.0
    shares = weight_facts(values, "w").histogram
    bins = numpy.histogram([1.0, -0.5, *[0.0] * 30, -1.0, *[0.0] * 31], bins=NUM_BINS, range=(-1, 1))[0] / 64
    assert shares == pytest.approx(tuple(bins))
    assert weight_facts(torch.zeros(2, 32), "w").histogram == (0.0,) * NUM_BINS


def test_nan_and_inf_are_refused_by_name() -> None:
    for value in (math.nan, math.inf, -math.inf):
        values = torch.ones(3, 32)
        values[1, 5] = value
        with pytest.raises(NonFiniteError, match="of it"):
            weight_facts(values, "of it")


def test_an_observer_of_nothing() -> None:
    observer = TensorObserver(8, "x")
    observer.update(torch.zeros(1, 0, 8))
    assert observer.is_empty and observer.facts().rows == 0 and observer.facts().maximum == 0.0
    assert observer.facts().massive == () and observer.sample().shape == (0, 8)


def test_an_observer_takes_pieces_as_one() -> None:
    values = normal(2, 300, 32)
    whole, pieces = TensorObserver(32, "x"), TensorObserver(32, "x")
    whole.update(values)
    for window in values:
        pieces.update(window[None])
    assert whole.facts().percentiles == pieces.facts().percentiles
    assert whole.facts().std == pytest.approx(pieces.facts().std, rel=1e-6)
    assert torch.equal(whole.sample(), pieces.sample()) and whole.sample().shape[0] <= 256
    assert whole.facts().rows == 600 and not whole.is_empty


def test_rows_are_counted_from_their_first_and_heads_have_no_place() -> None:
    largest = LargestValues(count=2)
    largest.update(torch.tensor([[1.0, -9.0], [2.0, 3.0]]), first=40)
    assert [(one.row, one.channel, one.value) for one in largest.values] == [(40, 1, -9.0), (41, 1, 3.0)]
    largest.update(torch.full((1, 2, 3, 2), 100.0))
    assert largest.values[0].value == -9.0


@settings(max_examples=20)
@given(st.integers(1, 600), st.integers(0, 5))
def test_the_largest_values_survive_many_others(num: int, seed: int) -> None:
    """Places are forgotten on the way, but never one of the largest."""
    values, largest = normal(num, 4, seed=seed), LargestValues(count=3)
    for place in range(num):
        largest.update(values[place : place + 1], first=place)
    wanted = values.abs().flatten().topk(min(3, values.numel())).values
    assert [abs(one.value) for one in largest.values] == wanted.tolist()


@pytest.mark.parametrize(("shape", "steps"), [((5, 1 << 17), 1), ((5, 1 << 18), 1), ((5, 1 << 16), 2), ((3, 0), 3)])
def test_pieces_hold_a_bounded_number_of_values(shape: tuple[int, int], steps: int) -> None:
    pieces = list(pieces_of(torch.empty(shape, device="meta")))
    assert [first for first, _ in pieces] == list(range(0, shape[0], steps))
    assert sum(piece.shape[0] for _, piece in pieces) == shape[0]


def test_noise_and_power() -> None:
    values = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert noise_and_power(values, torch.tensor([[2.0, -2.0], [0.0, 1.0]])) == (5.0, 26.0)
    wide, other = normal(3, 1 << 17), normal(3, 1 << 17, seed=1).to(torch.bfloat16)
    noise, power = noise_and_power(wide, other)
    assert noise == pytest.approx(float((other.double() - wide.double()).square().sum()), rel=1e-6)
    assert power == pytest.approx(float(wide.double().square().sum()), rel=1e-6)
