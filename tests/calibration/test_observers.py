"""Observers of static ranges: each by hand or against brute force on its own objective."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from microscale.calibration.observers import Observer, ObserverKind, ObserverSpec, make_observer, parse_observer
from microscale.errors import CalibrationError, NonFiniteError
from microscale.formats import parse_format
from microscale.kernels import fake_quantize

INT4 = "int4-f0/tensor:fp32"
WORDS = ["minmax", "percentile(99)", "ema(0.75)", "window(2)", "mse", "kl", "least_squares"]


def observer(word: str, fmt: str = INT4, **options: Any) -> Observer:
    record = parse_format(fmt)
    return make_observer(word, fmt=record, quantize=lambda x, amax: fake_quantize(x, record, amax=amax), **options)


def range_of(word: str, *batches: Tensor, fmt: str = INT4) -> float:
    one = observer(word, fmt)
    for batch in batches:
        one.update(batch)
    found = one.amax()
    assert found.shape == (1,) and found.dtype == torch.float32
    return float(found)


def squared_error(values: Tensor, amax: float, fmt: str) -> float:
    rounded = fake_quantize(values.to(torch.float32), fmt, amax=torch.tensor([amax]))
    return float((rounded.double() - values.double()).square().sum())


def heavy_tailed(rows: int = 200, cols: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator)
    values[3, 5] = -40.0
    return values


def test_simple_ones_by_hand() -> None:
    batches = [torch.tensor([[8.0, -1.0]]), torch.tensor([[0.0, -16.0]]), torch.tensor([[2.0, 0.5]])]
    assert range_of("minmax", *batches) == 16
    assert range_of("ema(0.75)", *batches) == 0.75 * (0.75 * 8 + 0.25 * 16) + 0.25 * 2
    assert range_of("window(2)", *batches) == 16
    assert range_of("window(1)", *batches) == 2
    assert range_of("percentile(100)", *batches) == 16
    assert range_of("percentile(50)", torch.arange(1.0, 1001.0)) == pytest.approx(500, rel=1 / 32)


@pytest.mark.parametrize("fmt", [INT4, "e4m3/tensor:fp32", "e2m1/tensor:fp32", "nvfp4"])
def test_mse_is_as_good_as_brute_force(fmt: str) -> None:
    """All rows fit into the sample, so its objective is the true one; 2000 ranges are the brute force."""
    values = heavy_tailed()
    found = range_of("mse", *values.split(64), fmt=fmt)
    errors = [squared_error(values, 40.0 * step / 2000, fmt) for step in range(20, 2001)]
    assert squared_error(values, found, fmt) <= 1.05 * min(errors)
    assert squared_error(values, found, fmt) <= squared_error(values, 40.0, fmt)


@pytest.mark.parametrize("word", ["mse", "least_squares"])
@pytest.mark.parametrize("fmt", [INT4, "e2m1/tensor:fp32"])
def test_clipping_a_lone_outlier_is_seen_to_pay(word: str, fmt: str) -> None:
    values = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    values[3, 5] = 9.0
    found = range_of(word, values, fmt=fmt)
    assert found < 8 and squared_error(values, found, fmt) < 0.9 * squared_error(values, 9.0, fmt)


def test_least_squares_is_a_fixed_point_of_its_two_steps() -> None:
    values = heavy_tailed(seed=2)
    found = range_of("least_squares", values)
    rounded = fake_quantize(values, INT4, amax=torch.tensor([found])).double()
    factor = float((values.double() * rounded).sum() / rounded.square().sum())
    assert factor == pytest.approx(1, abs=1e-3)
    assert squared_error(values, found, INT4) <= squared_error(values, 40.0, INT4)


def test_a_massive_row_among_very_many_counts() -> None:
    """One token in 20,000 holds all the energy: a plain sample would miss it and clip it away."""
    values = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(3))
    values[12_345] = 3000.0
    found = range_of("mse", *values.split(4096), fmt="e4m3/tensor:fp32")
    assert found == pytest.approx(3000, rel=0.05)


def test_kl_clips_a_lone_outlier_but_not_a_flat_distribution() -> None:
    values = torch.randn(1000, 64, generator=torch.Generator().manual_seed(4))
    values[3, 5] = 40.0
    assert 3 < range_of("kl", *values.split(300)) < 8
    flat = torch.rand(1000, 64, generator=torch.Generator().manual_seed(4))
    assert range_of("kl", flat, fmt="int8-f0/tensor:fp32") > 0.9


def test_kl_needs_numbers_that_are_rounded_one_by_one() -> None:
    with pytest.raises(CalibrationError, match="nvfp4 rounds a number by the block around it; use mse"):
        observer("kl", "nvfp4")


@pytest.mark.parametrize("word", WORDS)
def test_special_values(word: str) -> None:
    assert math.isnan(float(observer(word).amax()))
    assert range_of(word, torch.zeros(3, 8)) == 0
    one = observer(word, name="model.layers.1.mlp.down_proj")
    one.update(torch.full((4, 8), 2.0))
    for bad in (math.nan, math.inf):
        values = torch.ones(2, 8)
        values[1, 3] = bad
        with pytest.raises(NonFiniteError, match=r"input of model\.layers\.1\.mlp\.down_proj holds 1 NaN"):
            one.update(values)
    assert 0 < float(one.amax()) <= 2.0 + 1e-6


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_axes_and_repeatability(word: str, dtype: torch.dtype) -> None:
    values = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    before = values.clone()
    found = range_of(word, values)
    assert 0 < found <= float(values.abs().max())
    assert found == range_of(word, values) == range_of(word, values.reshape(18, 32).to(torch.float32))
    assert torch.equal(values, before)


@pytest.mark.parametrize("word", ["minmax", "percentile(99)", "mse", "kl", "least_squares"])
def test_batches_do_not_matter_where_only_numbers_count(word: str) -> None:
    values = heavy_tailed(seed=6)
    assert range_of(word, values) == pytest.approx(range_of(word, *values.split(17)), rel=1e-6)


def test_words() -> None:
    for word in WORDS:
        assert str(parse_observer(f" {word} ")) == word
    assert parse_observer("percentile") == ObserverSpec(kind=ObserverKind.PERCENTILE, argument=99.99)
    assert parse_observer(parse_observer("mse")) == ObserverSpec(kind=ObserverKind.MSE)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max", r"unknown observer 'max'; did you mean minmax\? there are minmax, percentile\(…\), ema"),
        ("", "unknown observer ''"),
        ("mse(3)", "takes no argument, got 3"),
        ("percentile(0)", "above 0 and at most 100, got 0"),
        ("percentile(100.5)", "above 0 and at most 100, got 100.5"),
        ("ema(1)", "between 0 and 1, got 1"),
        ("window(2.5)", "whole number of calls, got 2.5"),
        ("window(0)", "whole number of calls, got 0"),
        ("window(e)", "'e' is no number"),
        ("percentile(99", "unknown observer"),
    ],
)
def test_bad_words(word: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        parse_observer(word)
