"""Runs of a study as its page shows them."""

from __future__ import annotations

import dataclasses

from microscale.report.study_rows import StudyCell, StudyReportRow

BASE = StudyReportRow(
    model="m",
    format="none",
    method="unquantized",
    state="done",
    message="",
    bits_per_weight=16.0,
    num_bytes=2000,
    quantize_seconds=1.0,
    score_seconds=2.0,
    peak_bytes=3_000_000,
    recovery=100.0,
    gap_closure=None,
    cells=(StudyCell(value=20.25, recovery=100.0), None),
    is_on_front=True,
)


def run(method: str, format: str, bits: float, recovery: float, *, is_on_front: bool = False) -> StudyReportRow:
    changes = {"bits_per_weight": bits, "recovery": recovery, "is_on_front": is_on_front}
    return dataclasses.replace(BASE, method=method, format=format, **changes)


MANY = [
    BASE,
    run("best", "mxfp4", 4.25, 97.0, is_on_front=True),
    run("rtn", "mxfp4", 4.25, 90.0),
    run("gptq", "nvfp4", 4.5, 96.0),
    run("wide", "mxfp8", 8.25, 99.0, is_on_front=True),
]
