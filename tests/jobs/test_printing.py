"""JSON of results: strict, and the same for records and plain values."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from microscale.jobs.printing import json_text, json_value


@dataclass(frozen=True)
class Found:
    value: float

    def as_json(self) -> dict[str, object]:
        return {"value": self.value, "inner": [(1, -math.inf)], 3: "é"}  # type: ignore[dict-item]


def test_what_json_cannot_hold() -> None:
    """NaN and Inf are null, tuples lists, keys texts; results may lie within results."""
    expected = {"value": None, "inner": [[1, None]], "3": "é"}
    assert json_value(Found(math.nan)) == expected
    assert json_value((Found(math.inf), 0.5, None, True)) == [expected, 0.5, None, True]
    assert json.loads(json_text([Found(math.nan)])) == [expected]
    assert "é" in json_text(Found(1.0)) and "\n  " in json_text(Found(1.0))
