"""The page of ``microscale study``: every run in a table that can be sorted, and bits against recovery as a picture.

One HTML file that needs nothing else: style, script and pictures stand inside, so it opens offline. It computes
nothing: every number comes from the records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from microscale.nn.sizes import size_text
from microscale.report.page import page_template
from microscale.report.pareto import format_colors, pareto_svg
from microscale.report.study_rows import StudyReportRow

FAILED = "failed"
"""The state of a run whose message says why it failed."""


def study_html(title: str, rows: Sequence[StudyReportRow], *, tasks: Sequence[str], facts: Mapping[str, str]) -> str:
    """Return the page as text; ``tasks`` are the headings of the cells.

    Special values: what is not known, NaN included, is a dash; a run without recovery or bits is not on the picture.

    Raises:
        DependencyError: jinja2 is not installed.
    """
    template = page_template("study.html.j2")
    models = list(dict.fromkeys(row.model for row in rows))
    colors = format_colors(rows)
    found = [(model, pareto_svg([row for row in rows if row.model == model], colors)) for model in models]
    return template.render(
        title=title,
        facts=list(facts.items()),
        tasks=list(tasks),
        rows=[_shown(row) for row in rows],
        pictures=[(model, picture) for model, picture in found if picture],
        models=models,
        colors=colors,
        messages=_messages(rows),
    )


def _messages(rows: Sequence[StudyReportRow]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what is said of runs, under headings: what failed, and what is to be known of the others."""
    said = [(f"{row.model} {row.format} {row.method}", row) for row in rows if row.message]
    parts = {
        "Runs that failed": [(label, row.message) for label, row in said if row.state == FAILED],
        "Notes": [(label, row.message) for label, row in said if row.state != FAILED],
    }
    return [(heading, found) for heading, found in parts.items() if found]


def _number(value: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if value is not None and math.isfinite(value) else "–"


def _sort(value: float | None) -> str:
    return repr(float(value)) if value is not None and math.isfinite(value) else "1e308"


def _shown(row: StudyReportRow) -> dict[str, Any]:
    """Return the texts of one table row, each with the plain number to sort by."""
    numbers = [
        (_number(row.bits_per_weight, 2), _sort(row.bits_per_weight), ""),
        (_number(row.recovery, 2), _sort(row.recovery), ""),
        (_number(row.gap_closure, 1), _sort(row.gap_closure), ""),
    ]
    for cell in row.cells:
        if cell is None:
            numbers.append(("–", "1e308", ""))
            continue
        hints = [
            f"± {cell.stderr:.4f}" if cell.stderr is not None else "",
            f"recovery {cell.recovery:.2f} %" if cell.recovery is not None else "",
            f"gap closure {cell.gap_closure:.1f} %" if cell.gap_closure is not None else "",
        ]
        numbers.append((_number(cell.value, 4), _sort(cell.value), ", ".join(hint for hint in hints if hint)))
    sizes = [
        "–" if row.num_bytes is None else size_text(row.num_bytes),
        "–" if row.peak_bytes is None else size_text(row.peak_bytes),
    ]
    numbers += [
        (_number(row.quantize_seconds, 1), _sort(row.quantize_seconds), ""),
        (_number(row.score_seconds, 1), _sort(row.score_seconds), ""),
        (sizes[1], _sort(row.peak_bytes), ""),
        (sizes[0], _sort(row.num_bytes), ""),
    ]
    return {
        "words": [row.model, row.format, row.method, row.state],
        "numbers": numbers,
        "is_on_front": row.is_on_front,
        "is_baseline": row.is_baseline,
        "model": row.model,
        "format": row.format,
    }
