"""Scale rules as records: arguments, printing, constants. What they compute is tested in tests/kernels."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import FormatError
from microscale.formats import RuleKind, ScaleRule
from microscale.formats.rules import number_word


@pytest.mark.parametrize(
    "kind, arguments, words",
    [
        (RuleKind.FLOOR, (1.0,), ("floor", "0 argument", "got 1")),
        (RuleKind.EVEN, (1.0, 2.0), ("even", "0 arguments or 1 argument", "got 2")),
        (RuleKind.EVEN, (1.5,), ("whole number from 0 to 23",)),
        (RuleKind.EVEN, (24.0,), ("whole number from 0 to 23",)),
        (RuleKind.EVEN, (-1.0,), ("whole number from 0 to 23",)),
        (RuleKind.THRESHOLD, (), ("threshold", "1 argument", "got 0")),
        (RuleKind.THRESHOLD, (0.0,), ("positive",)),
        (RuleKind.THRESHOLD, (-7.0,), ("positive",)),
        (RuleKind.THRESHOLD, (math.nan,), ("finite",)),
        (RuleKind.THRESHOLD, (math.inf,), ("finite",)),
        (RuleKind.PRESCALE, (0.0,), ("(0, 1]",)),
        (RuleKind.PRESCALE, (1.5,), ("(0, 1]",)),
        (RuleKind.STD, (0.0,), ("positive",)),
        (RuleKind.PERCENTILE, (0.0,), ("(0, 100]",)),
        (RuleKind.PERCENTILE, (100.1,), ("(0, 100]",)),
        (RuleKind.MSE, (1.0,), ("2 argument", "got 1")),
        (RuleKind.MSE, (1.0, -1.0), ("low <= high",)),
        (RuleKind.AMAX, (1.0,), ("amax", "0 argument")),
        (RuleKind.MINMAX, (1.0,), ("minmax", "0 argument")),
    ],
)
def test_arguments_that_cannot_be(kind: RuleKind, arguments: tuple[float, ...], words: tuple[str, ...]) -> None:
    with pytest.raises(FormatError) as caught:
        ScaleRule(kind, arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "rule, text, multiplier",
    [
        (ScaleRule.FLOOR, "floor", 1.0),
        (ScaleRule.CEIL, "ceil", 1.0),
        (ScaleRule.RCEIL, "rceil", 1.0),
        (ScaleRule.EVEN, "even", 1.0),
        (ScaleRule(RuleKind.EVEN, (1.0,)), "even(1)", 1.0),
        (ScaleRule.threshold(7.25), "threshold(7.25)", 1.0),
        (ScaleRule.threshold(7), "threshold(7)", 1.0),
        (ScaleRule.prescale(), "prescale(0.75)", 4 / 3),
        (ScaleRule.prescale(0.5), "prescale(0.5)", 2.0),
        (ScaleRule.std(), "std(2.92247856)", 1.0),
        (ScaleRule.mse(), "mse(-1,1)", 1.0),
        (ScaleRule.percentile(99.9), "percentile(99.9)", 1.0),
        (ScaleRule.AMAX, "amax", 1.0),
        (ScaleRule.MINMAX, "minmax", 1.0),
    ],
)
def test_text_and_multiplier(rule: ScaleRule, text: str, multiplier: float) -> None:
    assert str(rule) == text
    assert rule.multiplier == multiplier


def test_constructors_equal_the_records_of_the_words() -> None:
    assert ScaleRule.threshold(7) == ScaleRule(RuleKind.THRESHOLD, (7.0,))
    assert hash(ScaleRule.threshold(7)) == hash(ScaleRule(RuleKind.THRESHOLD, (7.0,)))
    assert ScaleRule(RuleKind.FLOOR) == ScaleRule.FLOOR != ScaleRule.CEIL


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_number_word_reads_back_equal(value: float) -> None:
    assert float(number_word(value)) == value


def test_number_word_drops_the_point_of_whole_numbers() -> None:
    assert [number_word(v) for v in (7.0, -1.0, 0.0, 0.75, 1e16, 1e-7)] == ["7", "-1", "0", "0.75", "1e+16", "1e-07"]
