"""Counts of what ran: by name, summed, and in words."""

from __future__ import annotations

from collections import Counter

from microscale.kernels.backend import Operation
from microscale.planning.executed import by_name, linear_words, summed

COUNTS = Counter(
    {
        (Operation.LINEAR, "reference"): 2,
        (Operation.LINEAR, "cpu"): 80,
        (Operation.DEQUANTIZE, "cpu"): 5,
        (Operation.LINEAR_MIXED, "cpu"): 4,
    }
)


def test_by_name_and_summed() -> None:
    found = by_name(COUNTS)
    assert found == {"dequantize": {"cpu": 5}, "linear": {"cpu": 80, "reference": 2}, "linear_mixed": {"cpu": 4}}
    assert summed([found, {}, {"linear": {"cpu": 1, "other": 3}}]) == found | {
        "linear": {"cpu": 81, "other": 3, "reference": 2}
    }
    assert list(found["linear"]) == ["cpu", "reference"], "the order does not hang on what ran first"
    assert by_name(Counter()) == summed([]) == {}


def test_linear_words() -> None:
    """Segments of mixed formats are linear calls too; unpacking is none."""
    assert linear_words(by_name(COUNTS)) == (
        "84 of 86 linear calls on the CPU kernels, 2 on the reference path in torch"
    )
    assert linear_words({"linear": {"elsewhere": 1200}}) == "1,200 of 1,200 linear calls on the elsewhere"
    assert linear_words({"dequantize": {"cpu": 5}}) == "no quantized linear layer ran"
