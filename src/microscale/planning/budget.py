"""Budgets: bits per weight, bytes of the whole model, or milliseconds, from words such as 4.5bits, 1.2GB, 20ms."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum

from microscale.errors import AllocationError


class BudgetUnit(Enum):
    """What is limited.

    BITS: bits per weight over the layers that are allocated. BYTES: the whole model as a file, what is not quantized
    included. MILLISECONDS: the time of the allocated layers' products, from measurements on this machine.
    """

    BITS = "bits"
    BYTES = "bytes"
    MILLISECONDS = "ms"

    @property
    def title(self) -> str:
        """The unit in full, for tables and axes."""
        return {"bits": "bits per weight", "bytes": "bytes", "ms": "milliseconds"}[self.value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """An amount in bits per weight, bytes or milliseconds."""

    amount: float
    unit: BudgetUnit

    @property
    def text(self) -> str:
        """The amount with its unit."""
        return amount_text(self.amount, self.unit)


_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_WORD = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]+)")


def amount_text(amount: float, unit: BudgetUnit) -> str:
    """Return an amount as people write it: 4.500 bits, 1.200 GB, 20.00 ms."""
    if unit is BudgetUnit.BITS:
        return f"{amount:.3f} bits"
    if unit is BudgetUnit.MILLISECONDS:
        return f"{amount:.3f} ms"
    for word, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            return f"{amount / size:.3f} {word}"
    return f"{amount:.0f} B"


def parse_budget(text: str) -> Budget:
    """Return the budget that a word stands for.

    Raises:
        AllocationError: no number with a unit, or one that is not positive.
    """
    match = _WORD.fullmatch(text.strip())
    word = match[2].lower() if match else ""
    factors = {"bit": 1.0, "bits": 1.0, "ms": 1.0, "s": 1e3, **_BYTES}
    if match is None or word not in factors:
        raise AllocationError(f"budget {text!r} must be a number with a unit: 4.5bits, 1.2GB, 600MiB or 20ms")
    amount = float(match[1]) * factors[word]
    if not (amount > 0 and math.isfinite(amount)):
        raise AllocationError(f"budget {text!r} must be above 0")
    if word in _BYTES:
        return Budget(amount=math.floor(amount), unit=BudgetUnit.BYTES)
    unit = BudgetUnit.BITS if word.startswith("bit") else BudgetUnit.MILLISECONDS
    return Budget(amount=amount, unit=unit)
