"""The page of ``microscale analyze``: one HTML file that needs nothing else.

Heat map of layers × formats, bits against error, histograms with a format's grid, channels, recommendations, and all
numbers in a table that can be sorted and searched. It computes nothing but places and colours: every number comes from
the records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from microscale.report.analysis_pictures import (
    OWN_GRID,
    ChannelPicture,
    HistogramPicture,
    channels_svg,
    curve_svg,
    grid_of,
    histogram_svg,
    is_shown,
    percent_text,
)
from microscale.report.page import page_template

UNKNOWN = "1e308"
"""The key of a cell without a number: sorted behind all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalysisRow:
    """A tensor: numbers by heading, QSNR in decibels by format (None: not measured)."""

    name: str
    side: str
    role: str
    numbers: Mapping[str, float | None]
    qsnr: Mapping[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatRow:
    """A layer: output errors and further words by format (None: not measured)."""

    name: str
    errors: Mapping[str, float | None]
    hints: Mapping[str, str]


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
    heat: Sequence[HeatRow],
    facts: Mapping[str, str],
    curve: Sequence[tuple[str, float, float]],
    histograms: Sequence[HistogramPicture],
    grids: Sequence[str],
    channels: Sequence[ChannelPicture],
    advice: Sequence[Advice],
    massive: Sequence[tuple[str, str]],
) -> str:
    """Return the page as text; ``curve`` holds (format, bits, error), ``massive`` (tensor, words).

    ``grids`` are further formats whose grid a reader may lay over the histograms.

    Special values: what is not known or not finite is a dash.

    Raises:
        DependencyError: jinja2 is not installed.
    """
    template = page_template("analysis.html.j2")
    formats = list(dict.fromkeys(name for row in rows for name in row.qsnr))
    headings = list(dict.fromkeys(name for row in rows for name in row.numbers))
    shown_grids = [spec for spec in grids if grid_of(spec)]
    return template.render(
        title=title,
        facts=list(facts.items()),
        formats=formats,
        headings=headings,
        heat=_heat_cells(heat, formats),
        rows=[_shown(row, headings, formats) for row in rows],
        sides=list(dict.fromkeys(row.side for row in rows)),
        curve=curve_svg(curve),
        grids=[OWN_GRID, *shown_grids] if shown_grids else [],
        histograms=[(one.title, one.format, histogram_svg(one, shown_grids)) for one in histograms],
        channels=[(one.title, one.words, channels_svg(one)) for one in channels],
        advice=advice,
        massive=massive,
    )


def _heat_cells(rows: Sequence[HeatRow], formats: Sequence[str]) -> list[tuple[str, list[dict[str, str]]]]:
    known = [error for row in rows for error in row.errors.values() if error is not None and is_shown(error)]
    low, high = (math.log10(min(known)), math.log10(max(known))) if known else (0.0, 1.0)
    return [
        (row.name, [_heat(row, name, low, high) for name in formats])
        for row in rows
        if any(error is not None for error in row.errors.values())
    ]


def _heat(row: HeatRow, name: str, low: float, high: float) -> dict[str, str]:
    """Return colour, words and key of a cell: the larger the logarithm of its error, the stronger the colour."""
    error = row.errors.get(name)
    words = f"{row.name}, {name}: {percent_text(error)}; {row.hints.get(name, '')}".rstrip("; ")
    if error is None or not is_shown(error):
        text = "–" if error is None or not math.isfinite(error) else "0"
        return {"style": "", "words": words, "text": text, "sort": "0" if text == "0" else UNKNOWN}
    share = (math.log10(error) - low) / (high - low) if high > low else 0.0
    return {"style": f"--share: {100 * share:.0f}%", "words": words, "text": f"{100 * error:.2g}", "sort": repr(error)}


def _shown(row: AnalysisRow, headings: Sequence[str], formats: Sequence[str]) -> dict[str, Any]:
    values = [row.numbers.get(heading) for heading in headings]
    cells = [(f"{value:.4g}", repr(value)) if _is_number(value) else ("–", UNKNOWN) for value in values]
    for value in (row.qsnr.get(name) for name in formats):
        is_exact = value == math.inf
        known = (f"{value:.1f}", repr(value)) if _is_number(value) else ("∞", "1e300") if is_exact else ("–", UNKNOWN)
        cells.append(known)
    return {"words": [row.name, row.side, row.role], "side": row.side, "cells": cells}


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
