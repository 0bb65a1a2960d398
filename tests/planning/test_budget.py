"""Budgets: words, units, amounts in words, and what is refused."""

from __future__ import annotations

import pytest

from microscale.errors import AllocationError
from microscale.planning import (
    Budget,
    BudgetUnit,
    amount_text,
    parse_budget,
)


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("4.5bits", 4.5, BudgetUnit.BITS),
        ("4.5 bits", 4.5, BudgetUnit.BITS),
        ("1.2GB", 1.2e9, BudgetUnit.BYTES),
        ("3MiB", 3 * 2**20, BudgetUnit.BYTES),
        (".5kB", 500, BudgetUnit.BYTES),
        ("20ms", 20, BudgetUnit.MILLISECONDS),
        ("0.02s", 20, BudgetUnit.MILLISECONDS),
    ],
)
def test_budgets(text: str, amount: float, unit: BudgetUnit) -> None:
    assert parse_budget(text) == Budget(amount=amount, unit=unit)


@pytest.mark.parametrize("text", ["4.5", "bits", "-3GB", "0bits", "4.5furlongs", "nanbits", "infms", "", "4,5bits"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(AllocationError, match="budget"):
        parse_budget(text)


def test_amounts_are_shown_in_their_unit() -> None:
    assert amount_text(4.5, BudgetUnit.BITS) == "4.500 bits"
    assert amount_text(1.2e9, BudgetUnit.BYTES) == "1.200 GB" and amount_text(12, BudgetUnit.BYTES) == "12 B"
