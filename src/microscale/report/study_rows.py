"""What the page of ``microscale study`` shows of one run: plain records."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyCell:
    """One score of a run; what is None is not shown."""

    value: float | None
    stderr: float | None = None
    recovery: float | None = None
    gap_closure: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReportRow:
    """One run as the page shows it; recovery and gap closure in percent."""

    model: str
    format: str
    method: str
    state: str
    message: str
    bits_per_weight: float | None
    num_bytes: int | None
    quantize_seconds: float | None
    score_seconds: float | None
    peak_bytes: int | None
    recovery: float | None
    gap_closure: float | None
    cells: tuple[StudyCell | None, ...]
    is_on_front: bool = False

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unquantized model."""
        return self.format == "none"


def is_finite(value: float | None) -> bool:
    """Whether a number is known and finite."""
    return value is not None and math.isfinite(value)
