"""The page of ``microscale study``: every run in a table that can be sorted, and bits against recovery as a picture.

One HTML file that needs nothing else: style, script and pictures stand inside, so it opens offline. It computes nothing
but places on the picture: every number comes from the records.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microscale.report.comparison import size_text
from microscale.report.page import page_template

WIDTH, HEIGHT = 720.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 18.0, 16.0, 44.0
PALETTE = ("#1f5fae", "#c2571a", "#2f8f4e", "#8a4fbf", "#b8860b", "#c23b6d", "#2b9aa5", "#6b6b6b")


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
    seconds: float | None
    score_seconds: float | None
    peak_bytes: int | None
    recovery: float | None
    gap_closure: float | None
    cells: tuple[StudyCell | None, ...]
    is_on_front: bool = False


def study_html(title: str, rows: Sequence[StudyReportRow], *, tasks: Sequence[str], facts: Mapping[str, str]) -> str:
    """Return the page as text; ``tasks`` are the headings of the cells.

    Special values: what is not known, NaN included, is a dash; a run without recovery or bits is not on the picture.

    Raises:
        DependencyError: jinja2 is not installed.
    """
    template = page_template("study.html.j2")
    models = list(dict.fromkeys(row.model for row in rows))
    pictures = [(model, picture) for model in models if (picture := pareto_svg([r for r in rows if r.model == model]))]
    return template.render(
        title=title,
        facts=list(facts.items()),
        tasks=list(tasks),
        rows=[_shown(row) for row in rows],
        pictures=pictures,
        failures=[(f"{row.model} {row.format} {row.method}", row.message) for row in rows if row.message],
    )


def pareto_svg(rows: Sequence[StudyReportRow]) -> str:
    """Return bits per weight against recovery as SVG, a point for each run, a line along the front; or nothing."""
    shown = [row for row in rows if _is_finite(row.bits_per_weight) and _is_finite(row.recovery)]
    if len(shown) < 2:
        return ""
    across = _Axis(values=[float(row.bits_per_weight or 0) for row in shown], start=LEFT, end=WIDTH - RIGHT)
    up = _Axis(values=[float(row.recovery or 0) for row in shown], start=HEIGHT - BOTTOM, end=TOP)
    methods = list(dict.fromkeys(row.method for row in shown))
    parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="Bits per weight against recovery">']
    for tick in across.ticks():
        x = across.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in up.ticks():
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g} %</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">bits per weight</text>')
    front = sorted((row for row in shown if row.is_on_front), key=lambda row: row.bits_per_weight or 0)
    line = " ".join(f"{across.place(row.bits_per_weight or 0):.1f},{up.place(row.recovery or 0):.1f}" for row in front)
    parts.append(f'<polyline class="front" points="{line}"/>')
    for row in shown:
        x, y = across.place(row.bits_per_weight or 0), up.place(row.recovery or 0)
        color = PALETTE[methods.index(row.method) % len(PALETTE)]
        words = f"{row.format}, {row.method}: {row.bits_per_weight:.2f} bits, {row.recovery:.2f} %"
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if row.is_on_front else 4.5}" fill="{color}">'
            f"<title>{html.escape(words)}</title></circle>"
        )
    parts.append("</svg>")
    marks = "".join(
        f'<span style="--swatch:{PALETTE[place % len(PALETTE)]}">{html.escape(method)}</span>'
        for place, method in enumerate(methods)
    )
    return f'<div class="key">{marks}</div>{"".join(parts)}'


class _Axis:
    """A linear scale from values to places, with round ticks."""

    def __init__(self, *, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step)
        return [round(step * place, 10) for place in range(first, math.floor(self.high / step) + 1)]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


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
        (_number(row.seconds, 1), _sort(row.seconds), ""),
        (_number(row.score_seconds, 1), _sort(row.score_seconds), ""),
        (sizes[1], _sort(row.peak_bytes), ""),
        (sizes[0], _sort(row.num_bytes), ""),
    ]
    return {
        "words": [row.model, row.format, row.method, row.state],
        "numbers": numbers,
        "is_on_front": row.is_on_front,
        "is_baseline": row.format == "none",
    }
