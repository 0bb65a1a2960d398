"""Horizontal bars of perplexity differences as inline SVG that follows the page's colours.

The picture is drawn by matplotlib with text as text; colours become CSS variables of the page, and everything
that refers outside (namespaces, metadata) is removed.
"""

from __future__ import annotations

import io
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from microscale.errors import DependencyError

WEIGHTS_COLOR = "#010a01"
BOTH_COLOR = "#010a02"
TEXT_COLOR = "#010a03"
LINE_COLOR = "#010a04"
_CSS = {
    WEIGHTS_COLOR: "var(--weights)",
    BOTH_COLOR: "var(--both)",
    TEXT_COLOR: "var(--text)",
    LINE_COLOR: "var(--line)",
}

CUT_RATIO = 10.0
"""A bar this many times longer than the median bar is cut at the axis's end, and says so."""

MIN_BARS_TO_CUT = 4
"""With fewer bars than this nothing is cut."""

CUT_MARK = "▸"

BAR_HEIGHT = 0.36
ROW_INCHES = 0.44
FOOT_INCHES = 0.52
HEAD_INCHES = 0.06
WIDTH_INCHES = 8.2
NAME_LENGTH = 26
"""Longer names are broken into lines."""


def difference_bars(names: Sequence[str], weights: Mapping[str, float], both: Mapping[str, float]) -> str:
    """Return an ``<svg>`` element with up to two bars for each name: weights alone, weights and activations.

    The axis is linear and starts at 0 (lower where a difference is negative). Of four bars or
    more, those past ten times the median are cut and end in an arrow; each bar carries its number. NaN and Inf get
    their word instead.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise DependencyError("matplotlib", extra="report", purpose="the HTML report") from None
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "microscale", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        height = ROW_INCHES * len(names) + FOOT_INCHES + HEAD_INCHES
        figure = Figure(figsize=(WIDTH_INCHES, height))
        left = (0.25 + 0.085 * min(NAME_LENGTH, max(len(name) for name in names))) / WIDTH_INCHES
        axes = figure.add_axes((left, FOOT_INCHES / height, 0.99 - left, ROW_INCHES * len(names) / height))
        limit = axis_limit([*weights.values(), *both.values()])
        _draw(axes, names, weights, both, limit)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue())


def axis_limit(values: Sequence[float]) -> float:
    """Return where the axis ends: the largest difference that is at most ten times the (upper) median."""
    positive = sorted(value for value in values if math.isfinite(value) and value > 0)
    if len(positive) < MIN_BARS_TO_CUT:
        return positive[-1] if positive else 1.0
    median = statistics.median_high(positive)
    return max(value for value in positive if value <= CUT_RATIO * median)


def _draw(
    axes: Any, names: Sequence[str], weights: Mapping[str, float], both: Mapping[str, float], limit: float
) -> None:
    finite = [value for value in (*weights.values(), *both.values()) if math.isfinite(value)]
    lowest = min([0.0, *finite])
    span = limit - lowest
    axes.set_xlim(lowest - (0.10 * span if lowest < 0 else 0.0), limit + 0.14 * span)
    axes.set_ylim(len(names) - 0.5, -0.5)
    for row, name in enumerate(names):
        given = [(bars[name], color) for bars, color in ((weights, WEIGHTS_COLOR), (both, BOTH_COLOR)) if name in bars]
        for place, (value, color) in enumerate(given):
            offset = (place - (len(given) - 1) / 2) * BAR_HEIGHT
            _draw_bar(axes, row + offset, value, color, limit, 0.012 * span)
    labels = [textwrap.fill(name, NAME_LENGTH) for name in names]
    axes.set_yticks(range(len(names)), labels, color=TEXT_COLOR, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=TEXT_COLOR, labelsize=9, length=3, color=LINE_COLOR)
    axes.set_xlabel("perplexity minus that of the unquantized model (shorter is better)", color=TEXT_COLOR, fontsize=9)
    axes.grid(axis="x", color=LINE_COLOR, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.axvline(0, color=TEXT_COLOR, linewidth=0.8)


def _draw_bar(axes: Any, y: float, value: float, color: str, limit: float, gap: float) -> None:
    if not math.isfinite(value):
        axes.text(gap, y, f"{value} (no finite perplexity)", va="center", color=color, fontsize=8.5)
        return
    is_cut = value > limit
    shown = limit if is_cut else value
    axes.barh(y, shown, height=BAR_HEIGHT * 0.9, color=color)
    label = f"{value:+.2f}".replace("-", "−") + (f" {CUT_MARK}" if is_cut else "")
    is_left = value < 0
    axes.text(
        shown + (-gap if is_left else gap),
        y,
        label,
        va="center_baseline",
        ha="right" if is_left else "left",
        color=TEXT_COLOR,
        fontsize=8.5,
    )


def _inline(svg: str) -> str:
    """Cut the XML prologue, metadata and namespaces, scale to the page, and hand colours and fonts to CSS."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"|<svg height="[^"]*" width="[^"]*"', "<svg", svg, count=1)
    label = "Perplexity differences by format; the table has the same numbers."
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
    for color, css in _CSS.items():
        svg = svg.replace(color, css)
    return svg.strip()
