"""Budgets: words, units, amounts in words, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import AllocationError
from microscale.planning.budget import Budget, BudgetUnit, amount_text, parse_budget

BITS, BYTES, MILLISECONDS = BudgetUnit


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("4.5bits", 4.5, BITS),
        ("4.5 bits", 4.5, BITS),
        ("  4.5 BITS ", 4.5, BITS),
        ("1bit", 1.0, BITS),
        ("4.bits", 4.0, BITS),
        ("7b", 7, BYTES),
        ("7.9B", 7, BYTES),
        (".5kB", 500, BYTES),
        ("1.5MB", 1_500_000, BYTES),
        ("1.2GB", 1_200_000_000, BYTES),
        ("2TB", 2 * 10**12, BYTES),
        ("2KiB", 2048, BYTES),
        ("3MiB", 3 * 2**20, BYTES),
        ("0.5gib", 2**29, BYTES),
        ("1TiB", 2**40, BYTES),
        ("20ms", 20, MILLISECONDS),
        ("0.02s", 20, MILLISECONDS),
    ],
)
def test_budgets(text: str, amount: float, unit: BudgetUnit) -> None:
    assert parse_budget(text) == Budget(amount=amount, unit=unit)


@pytest.mark.parametrize(
    "text",
    ["4.5", "bits", "-3GB", "4.5furlongs", "nanbits", "infms", "", "4,5bits", "1e9B", "4.5bits/weight", "4.5 .bits"],
)
def test_words_that_are_no_budget(text: str) -> None:
    with pytest.raises(AllocationError) as caught:
        parse_budget(text)
    assert str(caught.value) == f"budget {text!r} must be a number with a unit: 4.5bits, 1.2GB, 600MiB or 20ms"


@pytest.mark.parametrize("text", ["0bits", "0.0GB", "0ms", "1" + "0" * 400 + "bits"])
def test_amounts_that_are_no_budget(text: str) -> None:
    """Zero, and what is infinite as a float."""
    with pytest.raises(AllocationError, match="must be above 0"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("amount", "unit", "text"),
    [
        (4.5, BITS, "4.500 bits"),
        (4.2505, BITS, "4.250 bits"),
        (0.0125, MILLISECONDS, "0.013 ms"),
        (0, BYTES, "0 B"),
        (999, BYTES, "999 B"),
        (1000, BYTES, "1.000 kB"),
        (999_999, BYTES, "999.999 kB"),
        (1e6, BYTES, "1.000 MB"),
        (1.2e9, BYTES, "1.200 GB"),
        (5e12, BYTES, "5000.000 GB"),
    ],
)
def test_amounts_in_words(amount: float, unit: BudgetUnit, text: str) -> None:
    assert amount_text(amount, unit) == Budget(amount=amount, unit=unit).text == text


@given(st.integers(1, 10**15), st.sampled_from(BudgetUnit))
def test_the_words_of_an_amount_stand_for_it_again(thousandths: int, unit: BudgetUnit) -> None:
    """Three decimals of the unit that the words choose: exact for bits and times, within half a step for bytes."""
    amount = thousandths / 1000 if unit is not BYTES else float(thousandths)
    found = parse_budget(Budget(amount=amount, unit=unit).text)
    assert found.unit is unit
    step = 0.0 if unit is not BYTES else max(1.0, 1e-3 * 10 ** (3 * min(3, (len(str(thousandths)) - 1) // 3)))
    assert abs(found.amount - amount) <= step + 1e-9 * amount
