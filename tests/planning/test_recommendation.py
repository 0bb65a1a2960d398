"""Recommendations: what is tried, what wins, and why in words."""

from __future__ import annotations

import math

import pytest
import torch

from microscale.kernels import fake_quantize
from microscale.planning.recommendation import qsnr, recommend


def test_recommendations_follow_the_numbers() -> None:
    normal = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    words = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    narrow = recommend([normal], **words, target_db=18.0)
    wide = recommend([normal], **words, target_db=25.0)
    best = recommend([normal], **words, target_db=119.0)
    assert narrow.bits < 4.6 and 6 < wide.bits < 7 and "no format tried reaches 119 dB" in best.reason
    assert narrow.qsnr_db >= 18 and str(narrow.format) in narrow.reason
    assert narrow.qsnr_db == pytest.approx(qsnr(normal, fake_quantize(normal, narrow.format)))
    assert 1 + narrow.exponent_bits + narrow.mantissa_bits == 4


def test_qsnr() -> None:
    ones = torch.ones(2, 2)
    assert qsnr(ones, ones) == math.inf and qsnr(ones, ones * 1.1) == pytest.approx(20.0, abs=1e-4)


def test_a_scale_of_the_tensor_is_taken_from_each_tensor() -> None:
    normal = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    words = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    alone = recommend([normal * 1e-6], **words, target_db=20.0)
    beside = recommend([normal * 1e-6, normal * 1e6], **words, target_db=20.0)
    assert alone.format == beside.format and alone.scale == "e4m3+fp32" and alone.bits == 4.5
    assert beside.qsnr_db == pytest.approx(alone.qsnr_db, abs=0.1)


def test_every_tensor_weighs_the_same() -> None:
    normal = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    words = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    exact = torch.ones(12, 64) * 1024  # no format loses anything of it
    assert recommend([exact], **words, target_db=119.0).qsnr_db == math.inf
    both = recommend([exact, normal], **words, target_db=15.0)
    halved = qsnr(normal, fake_quantize(normal, both.format)) + 10 * math.log10(2)
    assert both.qsnr_db == pytest.approx(halved, abs=1e-3)
