"""The page of ``microscale analyze``: one HTML file that needs nothing else.

Heat map of layers × formats, bits against error, histograms with a format's grid, channels, recommendations, and all
numbers in a table that can be sorted. It computes nothing but places and colours: every number comes from the records.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microscale.formats import BlockFormat, parse_format
from microscale.report.grids import positive_values
from microscale.report.page import page_template

WIDTH, HEIGHT = 340.0, 150.0
CURVE_WIDTH, CURVE_HEIGHT = 720.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 90.0, 16.0, 44.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisRow:
    """A layer: numbers of its weight and inputs by heading, output errors by format (None: not measured)."""

    name: str
    role: str
    shape: str
    numbers: Mapping[str, float | None]
    errors: Mapping[str, float | None]
    hints: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramPicture:
    """How values lie in their blocks, shares in equal bins from -1 to 1, beside the grid of a format."""

    title: str
    shares: Sequence[float]
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPicture:
    """The largest magnitude of channels in order, with words below."""

    title: str
    values: Sequence[float]
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A recommendation as shown: of which tensors, which format, its parts, and why."""

    title: str
    format: str
    parts: str
    reason: str


def analysis_html(
    title: str,
    rows: Sequence[AnalysisRow],
    *,
    facts: Mapping[str, str],
    curve: Sequence[tuple[str, float, float]],
    histograms: Sequence[HistogramPicture],
    channels: Sequence[ChannelPicture],
    advice: Sequence[Advice],
    massive: Sequence[tuple[str, str]],
) -> str:
    """Return the page as text; ``curve`` holds (format, bits, error), ``massive`` (layer, words).

    Special values: what is not known or not finite is a dash.

    Raises:
        DependencyError: jinja2 is not installed.
    """
    template = page_template("analysis.html.j2")
    formats = list(dict.fromkeys(name for row in rows for name in row.errors))
    headings = list(dict.fromkeys(name for row in rows for name in row.numbers))
    known = [error for row in rows for error in row.errors.values() if error is not None and _is_shown(error)]
    low, high = (math.log10(min(known)), math.log10(max(known))) if known else (0.0, 1.0)
    heat = [
        (row.name, [_heat(row.errors.get(name), name, low, high) for name in formats])
        for row in rows
        if any(error is not None for error in row.errors.values())
    ]
    return template.render(
        title=title,
        facts=list(facts.items()),
        formats=formats,
        headings=headings,
        heat=heat,
        rows=[_shown(row, headings, formats) for row in rows],
        curve=curve_svg(curve),
        histograms=[(one.title, one.format, histogram_svg(one)) for one in histograms],
        channels=[(one.title, one.words, channels_svg(one.values)) for one in channels],
        advice=advice,
        massive=massive,
    )


def _is_shown(error: float | None) -> bool:
    return error is not None and math.isfinite(error) and error > 0


def _percent(error: float | None) -> str:
    return f"{100 * error:.3g} %" if error is not None and math.isfinite(error) else "–"


def _heat(error: float | None, name: str, low: float, high: float) -> dict[str, str]:
    """Return colour and words of a cell: from green (least error) to red (largest), by the logarithm."""
    if error is None or not _is_shown(error):
        return {"style": "", "words": f"{name}: {_percent(error)}", "text": "" if error is None else "0"}
    share = (math.log10(error) - low) / (high - low) if high > low else 0.0
    hue = 140 - 140 * share
    return {
        "style": f"background: hsl({hue:.0f} 62% var(--heat))",
        "words": f"{name}: {_percent(error)}",
        "text": f"{100 * error:.2g}",
    }


def _shown(row: AnalysisRow, headings: Sequence[str], formats: Sequence[str]) -> dict[str, Any]:
    cells: list[tuple[str, str, str]] = []
    for heading in headings:
        value = row.numbers.get(heading)
        is_known = value is not None and math.isfinite(value)
        text = f"{value:.4g}" if is_known else "–"
        cells.append(
            (text, repr(float(value)) if is_known and value is not None else "1e308", row.hints.get(heading, ""))
        )
    for name in formats:
        error = row.errors.get(name)
        sort = repr(error) if error is not None and math.isfinite(error) else "1e308"
        cells.append((_percent(error), sort, row.hints.get(name, "")))
    return {"words": [row.name, row.role, row.shape], "cells": cells}


def curve_svg(points: Sequence[tuple[str, float, float]]) -> str:
    """Return bits per weight against output error (logarithmic) as SVG, or nothing where fewer than two are known."""
    shown = [point for point in points if _is_shown(point[2]) and math.isfinite(point[1])]
    if len(shown) < 2:
        return ""
    bits, logs = [point[1] for point in shown], [math.log10(point[2]) for point in shown]
    left, right = min(bits) - 0.3, max(bits) + 0.3
    low, high = math.floor(min(logs) * 2) / 2 - 0.1, math.ceil(max(logs) * 2) / 2 + 0.1

    def x(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (CURVE_WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return CURVE_HEIGHT - BOTTOM - (value - low) / (high - low) * (CURVE_HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg class="wide" viewBox="0 0 {CURVE_WIDTH:.0f} {CURVE_HEIGHT:.0f}" role="img"'
        ' aria-label="Bits per weight against output error">'
    ]
    for tick in range(math.ceil(left), math.floor(right) + 1):
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" y1="{TOP}" x2="{x(tick):.1f}" y2="{CURVE_HEIGHT - BOTTOM}"/>'
        )
        parts.append(f'<text x="{x(tick):.1f}" y="{CURVE_HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    for half in range(math.ceil(low * 2), math.floor(high * 2) + 1):
        place = y(half / 2)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{place:.1f}" x2="{CURVE_WIDTH - RIGHT}" y2="{place:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{100 * 10 ** (half / 2):.2g} %</text>'
        )
    parts.append(f'<text x="{CURVE_WIDTH / 2}" y="{CURVE_HEIGHT - 8}" text-anchor="middle">bits per weight</text>')
    for (name, own, error), value in zip(shown, logs, strict=True):
        words = html.escape(f"{name}: {own:.2f} bits, {_percent(error)}")
        parts.append(f'<circle cx="{x(own):.1f}" cy="{y(value):.1f}" r="5"><title>{words}</title></circle>')
        parts.append(f'<text x="{x(own) + 8:.1f}" y="{y(value) - 6:.1f}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def histogram_svg(picture: HistogramPicture) -> str:
    """Return bars of the shares from -1 to 1, and a tick for each value that the format's element can hold."""
    highest = max([*picture.shares, 1e-12])
    step = WIDTH / max(len(picture.shares), 1)
    label = html.escape(
        f"{picture.title}: values by their part of the block's largest, with the grid of {picture.format}"
    )
    parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}">']
    for place, share in enumerate(picture.shares):
        tall = share / highest * (HEIGHT - 34)
        parts.append(_bar(place * step, HEIGHT - 24, step * 0.92, tall))
    for value in grid_of(picture.format):
        x = (value + 1) / 2 * WIDTH
        parts.append(f'<line class="tick" x1="{x:.2f}" y1="6" x2="{x:.2f}" y2="{HEIGHT - 18:.0f}"/>')
    for x, text, anchor in ((0, "−1", "start"), (WIDTH / 2, "0", "middle"), (WIDTH, "1", "end")):
        parts.append(f'<text x="{x}" y="{HEIGHT - 4}" text-anchor="{anchor}">{text}</text>')
    return "".join([*parts, "</svg>"])


def _bar(x: float, foot: float, wide: float, tall: float) -> str:
    return f'<rect class="bar" x="{x:.2f}" y="{foot - tall:.2f}" width="{wide:.2f}" height="{tall:.2f}"/>'


def grid_of(spec: str) -> list[float]:
    """Return the values of a format's element divided by the largest, of both signs; none for more than 6 bits."""
    fmt = parse_format(spec)
    if not isinstance(fmt, BlockFormat) or fmt.element.bits > 6:
        return []
    values = positive_values(fmt.element)
    top = max(values)
    return sorted({sign * value / top for value in values for sign in (-1.0, 1.0)})


def channels_svg(values: Sequence[float]) -> str:
    """Return the magnitudes of channels as bars on a logarithmic axis."""
    shown = [value for value in values if _is_shown(value)]
    if not shown:
        return ""
    low, high = math.log10(min(shown)) - 0.1, math.log10(max(shown))
    step = WIDTH / len(values)
    parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="Largest magnitude of each channel">']
    for place, value in enumerate(values):
        if not _is_shown(value):
            continue
        tall = (math.log10(value) - low) / max(high - low, 1e-9) * (HEIGHT - 20)
        parts.append(_bar(place * step, HEIGHT, max(step, 0.5), tall))
    parts.append(f'<text x="0" y="12">{max(shown):.3g}</text></svg>')
    return "".join(parts)
