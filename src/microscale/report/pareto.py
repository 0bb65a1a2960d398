"""Bits per weight against recovery as a picture: a point for each run, coloured by format, named where there is room.

It computes nothing but places: every number comes from the records.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from microscale.report.study_rows import StudyReportRow, is_finite

WIDTH, HEIGHT = 760.0, 460.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 18.0, 16.0, 44.0
NUM_COLORS = 8
"""Colors that the page defines for formats, for light and dark: ``--format-0`` and so on."""
CHARACTER, LINE = 6.3, 12.0
"""Room that a name takes: the width of a letter and the height of a line, in the units of the picture."""


def format_colors(rows: Sequence[StudyReportRow]) -> dict[str, str]:
    """Return the color of each quantized format as CSS; after eight they begin again."""
    formats = dict.fromkeys(row.format for row in rows if not row.is_baseline)
    return {format: f"var(--format-{place % NUM_COLORS})" for place, format in enumerate(formats)}


def pareto_svg(rows: Sequence[StudyReportRow], colors: dict[str, str]) -> str:
    """Return the runs of one model as SVG, or nothing where no quantized run has bits and recovery.

    The unquantized model is the line at its recovery, so that the axis of bits spans the quantized runs alone. The
    dashed line joins the runs on the front. Names stand beside the points: those on the front first, then all that
    find room; the others show theirs when pointed at.
    """
    shown = [row for row in rows if is_finite(row.bits_per_weight) and is_finite(row.recovery)]
    points = [row for row in shown if not row.is_baseline]
    if not points:
        return ""
    across = PlotAxis(values=[bits(row) for row in points], start=LEFT, end=WIDTH - RIGHT)
    up = PlotAxis(values=[recovery(row) for row in shown], start=HEIGHT - BOTTOM, end=TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="Bits per weight against recovery">']
    parts += _grid(across, up)
    front = sorted((row for row in points if row.is_on_front), key=bits)
    line = " ".join(f"{across.place(bits(row)):.1f},{up.place(recovery(row)):.1f}" for row in front)
    if line:
        parts.append(f'<polyline class="front" points="{line}"/>')
    boxes: list[Box] = []
    for row in shown:
        if row.is_baseline:
            y = up.place(recovery(row))
            parts.append(f'<line class="whole" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
            words = f"unquantized, {row.bits_per_weight:g} bits"
            parts.append(f'<text x="{LEFT + 6}" y="{y - 5:.1f}">{html.escape(words)}</text>')
            boxes.append(Box(left=LEFT, right=LEFT + 6 + CHARACTER * len(words), top=y - 5 - LINE, bottom=y))
    places = {id(row): (across.place(bits(row)), up.place(recovery(row))) for row in points}
    boxes += [Box(left=x - 4, right=x + 4, top=y - 4, bottom=y + 4) for x, y in places.values()]
    for row in sorted(points, key=lambda row: (not row.is_on_front, -recovery(row))):
        parts += _point(row, places[id(row)], boxes, colors[row.format])
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Room on the picture that something takes."""

    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether two overlap."""
        is_beside = self.right <= other.left or other.right <= self.left
        return not (is_beside or self.bottom <= other.top or other.bottom <= self.top)


class PlotAxis:
    """A linear scale from values to places, with round ticks."""

    def __init__(self, *, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def place(self, value: float) -> float:
        """Return the place of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round values, about six."""
        rough = (self.high - self.low) / 6
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step)
        return [round(step * place, 10) for place in range(first, math.floor(self.high / step) + 1)]


def bits(row: StudyReportRow) -> float:
    """Return the bits per weight of a run that has them."""
    return float(row.bits_per_weight or 0.0)


def recovery(row: StudyReportRow) -> float:
    """Return the recovery of a run that has one."""
    return float(row.recovery or 0.0)


def _grid(across: PlotAxis, up: PlotAxis) -> list[str]:
    parts: list[str] = []
    for tick in across.ticks():
        x = across.place(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in up.ticks():
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g} %</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" text-anchor="middle">bits per weight</text>')
    return parts


def _point(row: StudyReportRow, place: tuple[float, float], boxes: list[Box], color: str) -> list[str]:
    """Return a point with its name, where that fits beside it; the room that the name takes is added to the boxes."""
    x, y = place
    words = f"{row.format}, {row.method}: {row.bits_per_weight:.2f} bits, {row.recovery:.2f} %"
    format = html.escape(row.format)
    radius = 6 if row.is_on_front else 4.5
    parts = [
        f'<circle data-format="{format}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}" style="fill:{color}">'
        f"<title>{html.escape(words)}</title></circle>"
    ]
    found = _room(row, place, boxes)
    if found is not None:
        anchor, start, box = found
        boxes.append(box)
        kind = ' class="named"' if row.is_on_front else ""
        parts.append(
            f'<text{kind} data-format="{format}" x="{start:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}"'
            f' style="fill:{color}">'
            f"{html.escape(row.method)}</text>"
        )
    return parts


def _room(row: StudyReportRow, place: tuple[float, float], boxes: Sequence[Box]) -> tuple[str, float, Box] | None:
    """Return anchor, start and room of a name to the right or left of its point; a run on the front gets one anyway."""
    x, y = place
    length = CHARACTER * len(row.method)
    right = Box(left=x + 5, right=x + 9 + length, top=y - LINE / 2, bottom=y + LINE / 2)
    left = Box(left=x - 9 - length, right=x - 5, top=y - LINE / 2, bottom=y + LINE / 2)
    choices = [("start", x + 9, right), ("end", x - 9, left)]
    inside = [one for one in choices if one[2].left >= LEFT and one[2].right <= WIDTH - RIGHT + 8]
    free = [one for one in inside if not any(one[2].meets(box) for box in boxes)]
    if free:
        return free[0]
    return (inside or choices)[0] if row.is_on_front else None
