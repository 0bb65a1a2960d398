"""The records of a study's page: what counts as known, and which run is the baseline."""

from __future__ import annotations

import dataclasses
import math

import pytest

from microscale.report.study_rows import is_finite
from report_rows import BASE


@pytest.mark.parametrize(
    ("value", "answer"),
    [(None, False), (math.nan, False), (math.inf, False), (-math.inf, False), (0.0, True), (-0.0, True), (1e308, True)],
)
def test_numbers_that_are_known(value: float | None, answer: bool) -> None:
    assert is_finite(value) is answer


def test_the_unquantized_model_is_the_baseline_whatever_its_method_is_called() -> None:
    assert BASE.is_baseline and dataclasses.replace(BASE, method="x").is_baseline
    assert not dataclasses.replace(BASE, format="mxfp4").is_baseline
