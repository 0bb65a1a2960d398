"""Calibration windows: consecutive, packed, chosen by seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from microscale.calibration.windows import calibration_windows
from microscale.errors import TextError


@given(
    tokens=st.integers(1, 200),
    samples=st.integers(1, 12),
    window=st.integers(2, 20),
    has_bos=st.booleans(),
    seed=st.integers(0, 5),
)
def test_windows_are_different_consecutive_pieces(
    tokens: int, samples: int, window: int, has_bos: bool, seed: int
) -> None:
    stream = list(range(100, 100 + tokens))
    bos = 7 if has_bos else None
    step = window - 1 if has_bos else window
    if tokens // step < samples:
        with pytest.raises(TextError, match=rf"has {tokens:,} tokens?; .* takes? {samples * step}\."):
            calibration_windows(stream, samples=samples, window=window, bos=bos, seed=seed)
        return
    found = calibration_windows(stream, samples=samples, window=window, bos=bos, seed=seed)
    assert found.shape == (samples, window) and found.dtype == torch.int64
    if has_bos:
        assert found[:, 0].tolist() == [7] * samples
    text = found[:, 1:] if has_bos else found
    starts = [int(row[0]) for row in text]
    assert len(set(starts)) == samples and all((start - 100) % step == 0 for start in starts)
    assert all(row.tolist() == list(range(start, start + step)) for row, start in zip(text, starts, strict=True))
    if tokens // step == samples:
        assert starts == sorted(starts)


def test_the_choice_follows_the_seed_and_fewer_samples_are_a_part_of_more() -> None:
    stream = torch.arange(1000)
    options = {"window": 11, "bos": 0}
    first = calibration_windows(stream, samples=20, seed=1, **options)
    assert torch.equal(first, calibration_windows(stream, samples=20, seed=1, **options))
    assert torch.equal(first[:5], calibration_windows(stream, samples=5, seed=1, **options))
    assert not torch.equal(first, calibration_windows(stream, samples=20, seed=2, **options))


def test_the_stream_is_not_shared() -> None:
    stream = torch.arange(10)
    calibration_windows(stream, samples=2, window=5, bos=None).zero_()
    assert stream.tolist() == list(range(10))


def test_bad_calls() -> None:
    with pytest.raises(TextError, match="take at most 2 samples"):
        calibration_windows(range(25), samples=3, window=11, bos=1)
    with pytest.raises(TextError, match="take shorter windows"):
        calibration_windows([], samples=1, window=11, bos=1)
    with pytest.raises(TextError, match="samples must be positive, got 0"):
        calibration_windows(range(25), samples=0, window=11, bos=1)
    with pytest.raises(TextError, match=r"at least 2 tokens, got 1"):
        calibration_windows(range(25), samples=1, window=1, bos=1)
    with pytest.raises(TextError, match=r"at least 1 token, got 0"):
        calibration_windows(range(25), samples=1, window=0, bos=None)
