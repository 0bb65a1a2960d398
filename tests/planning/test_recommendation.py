"""Recommendations: what is tried, what wins, and why in words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from microscale.formats import BlockFormat, parse_format
from microscale.kernels import fake_quantize
from microscale.planning.recommendation import qsnr, recommend, tried_formats


def test_recommendations_follow_the_numbers() -> None:
    normal = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    words: dict[str, Any] = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
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
    words: dict[str, Any] = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    alone = recommend([normal * 1e-6], **words, target_db=20.0)
    beside = recommend([normal * 1e-6, normal * 1e6], **words, target_db=20.0)
    assert alone.format == beside.format and alone.scale == "e4m3+fp32" and alone.bits == 4.5
    assert beside.qsnr_db == pytest.approx(alone.qsnr_db, abs=0.1)


def test_every_tensor_weighs_the_same() -> None:
    normal = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    words: dict[str, Any] = {"role": "mlp.down", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    exact = torch.ones(12, 64) * 1024  # no format loses anything of it
    assert recommend([exact], **words, target_db=119.0).qsnr_db == math.inf
    both = recommend([exact, normal], **words, target_db=15.0)
    halved = qsnr(normal, fake_quantize(normal, both.format)) + 10 * math.log10(2)
    assert both.qsnr_db == pytest.approx(halved, abs=1e-3)


def test_every_combination_is_tried_once() -> None:
    tried = tried_formats()
    assert len(tried) == len(set(tried)) == 3 * (4 + 7 * 3) + 3
    assert {spec for spec in tried if "threshold" in spec} == {
        f"e2m1/{block}:e8m0:threshold(7.25)" for block in (16, 32, 64)
    }
    assert [spec for spec in tried if "e4m3+fp32" in spec] == [
        f"{element}/16:e4m3+fp32:amax" for element in ("e2m1", "e1m2", "int4")
    ]
    assert all(isinstance(parse_format(spec), BlockFormat) for spec in tried)


@pytest.mark.parametrize(
    ("values", "rounded", "decibels"),
    [
        ([[1.0, -1.0]], [[1.0, -1.0]], math.inf),
        ([[0.0, -0.0]], [[0.0, 0.0]], 0.0),
        ([[0.0, 0.0]], [[1.0, 0.0]], -math.inf),
        ([[3.0, 4.0]], [[3.0, 3.5]], 20.0),  # 25 over 0.25
        ([[1.0, 1.0]], [[0.0, 0.0]], 0.0),
        ([[1.0]], [[11.0]], -20.0),
    ],
)
def test_qsnr_by_hand(values: list[list[float]], rounded: list[list[float]], decibels: float) -> None:
    assert qsnr(torch.tensor(values), torch.tensor(rounded)) == pytest.approx(decibels, abs=1e-9)


def test_the_best_is_that_of_trying_each() -> None:
    """The narrowest of all that reach the target, of equal bits the best; where none does, the best of all."""
    rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    words: dict[str, Any] = {"role": "r", "side": "inputs", "crest": 2.3, "kurtosis": 3.0, "outliers": 0}
    tried = {
        spec: (parse_format(spec).bits_per_value(), qsnr(rows, fake_quantize(rows, spec))) for spec in tried_formats()
    }
    for target in (15.0, 20.0, 28.0, 40.0):
        reached = {spec: facts for spec, facts in tried.items() if facts[1] >= target}
        found = recommend([rows], **words, target_db=target)
        bits, decibels = tried[found.format]
        assert found.bits == bits == min(one for one, _ in reached.values())
        assert decibels == pytest.approx(max(db for one, db in reached.values() if one == bits), abs=1e-6)
    assert recommend([rows], **words, target_db=1e3).qsnr_db == pytest.approx(
        max(db for _, db in tried.values()), abs=1e-6
    )


@pytest.mark.parametrize(
    ("crest", "outliers", "words"),
    [
        (2.30, 0, "crest factor of 2.30, close to a normal distribution's 2.3; kurtosis is 3;"),
        (2.64, 2, "2.64, close to a normal distribution's 2.3; kurtosis is 3, and 2 channels stand out;"),
        (2.65, 0, "2.65, larger than a normal distribution's 2.3; kurtosis is 3;"),
    ],
)
def test_reasons_in_words(crest: float, outliers: int, words: str) -> None:
    rows = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    found = recommend([rows], role="r", side="inputs", crest=crest, kurtosis=3.0, outliers=outliers, target_db=18.0)
    assert words in found.reason and found.reason.endswith(".")
    assert f"{found.format} is the narrowest that reaches 18 dB, with {found.qsnr_db:.1f} dB" in found.reason


def test_the_parts_of_the_format_are_those_of_its_word() -> None:
    """Whole numbers of 16: nothing but integer elements of 8 bits keeps 255 steps."""
    rows = torch.arange(-127.0, 129.0).repeat(2, 1)
    found = recommend([rows], role="r", side="weights", crest=1.0, kurtosis=1.8, outliers=0, target_db=44.0)
    element, _, rest = found.format.partition("/")
    assert element == "int8" and (found.exponent_bits, found.mantissa_bits) == (0, 7)
    assert rest.split(":")[:2] == [str(found.block_size), found.scale] and found.scale == "e8m0"
    assert rest.split(":", 2)[2] == found.rule and (found.role, found.side) == ("r", "weights")
