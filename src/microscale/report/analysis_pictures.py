"""The pictures of ``microscale analyze`` as SVG: bits against error, histograms with the grids of formats, channels."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from microscale.formats import BlockFormat, parse_format
from microscale.report.grids import positive_values

WIDTH, HEIGHT = 340.0, 150.0
CURVE_WIDTH, CURVE_HEIGHT = 720.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 90.0, 16.0, 44.0
LABEL_WIDTH, LABEL_HEIGHT = 90.0, 13.0
AXIS = 44.0
"""What the labels of the decades take beside the channels."""
OWN_GRID = "recommended"
"""The word of the grid that each picture shows first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramPicture:
    """How values lie in their blocks, shares in equal bins from -1 to 1, beside the grid of a format."""

    title: str
    shares: Sequence[float]
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPicture:
    """The largest magnitude of runs of channels in order, with words below."""

    title: str
    values: Sequence[float]
    num_channels: int
    words: str


def is_shown(error: float | None) -> bool:
    """Whether a number has a place on a logarithmic axis."""
    return error is not None and math.isfinite(error) and error > 0


def percent_text(error: float | None) -> str:
    """Return a share in percent, a dash for what is not known."""
    return f"{100 * error:.3g} %" if error is not None and math.isfinite(error) else "–"


def curve_svg(points: Sequence[tuple[str, float, float]]) -> str:
    """Return bits per weight against output error (logarithmic) as SVG, or nothing where fewer than two are known.

    The line joins the points that no other beats in both.
    """
    shown = [point for point in points if is_shown(point[2]) and math.isfinite(point[1])]
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
    front: list[tuple[float, float]] = []
    for own, value in sorted(zip(bits, logs, strict=True)):
        if not front or value < front[-1][1]:
            front.append((own, value))
    line = " ".join(f"{x(own):.1f},{y(value):.1f}" for own, value in front)
    parts.append(f'<polyline class="front" points="{line}"/>')
    for (name, own, error), value in zip(shown, logs, strict=True):
        words = html.escape(f"{name}: {own:.2f} bits, {percent_text(error)}")
        parts.append(f'<circle cx="{x(own):.1f}" cy="{y(value):.1f}" r="5"><title>{words}</title></circle>')
    middles = _label_places([(x(own), y(value)) for own, value in zip(bits, logs, strict=True)])
    for (name, own, _), middle in zip(shown, middles, strict=True):
        parts.append(f'<text class="over" x="{x(own) + 9:.1f}" y="{middle - 2:.1f}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _label_places(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return the heights of labels beside points: where two would overlap, the lower one is pushed down."""
    heights = [0.0] * len(places)
    done: list[tuple[float, float]] = []
    for index in sorted(range(len(places)), key=lambda index: places[index][1]):
        across, height = places[index]
        for other_across, other in done:
            if abs(other_across - across) < LABEL_WIDTH and height - other < LABEL_HEIGHT:
                height = other + LABEL_HEIGHT
        heights[index] = height
        done.append((across, height))
        done.sort(key=lambda one: one[1])
    return heights


def histogram_svg(picture: HistogramPicture, grids: Sequence[str] = ()) -> str:
    """Return bars of the shares from -1 to 1, and a tick for each value that the format's element can hold.

    The ticks of further ``grids`` are there too, hidden until the page shows them.
    """
    highest = max([*picture.shares, 1e-12])
    step = WIDTH / max(len(picture.shares), 1)
    label = html.escape(
        f"{picture.title}: values by their part of the block's largest, with the grid of {picture.format}"
    )
    parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{label}">']
    for place, share in enumerate(picture.shares):
        tall = share / highest * (HEIGHT - 34)
        parts.append(_bar(place * step, HEIGHT - 24, step * 0.92, tall))
    for name, spec in ((OWN_GRID, picture.format), *((spec, spec) for spec in grids)):
        places = [(value + 1) / 2 * WIDTH for value in grid_of(spec)]
        path = "".join(f"M{x:.2f} 6V{HEIGHT - 18:.0f}" for x in places)
        hidden = "" if name == OWN_GRID else ' style="display: none"'
        parts.append(f'<path class="tick" data-grid="{html.escape(name)}"{hidden} d="{path}"/>')
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


def channels_svg(picture: ChannelPicture) -> str:
    """Return the magnitudes of channels as bars on a logarithmic axis, with decades as lines."""
    shown = [value for value in picture.values if is_shown(value)]
    if not shown:
        return ""
    low, high = math.log10(min(shown)) - 0.1, math.log10(max(shown)) + 0.05
    step, foot = (WIDTH - AXIS) / len(picture.values), HEIGHT - 18
    last = picture.num_channels - 1

    def y(value: float) -> float:
        return foot - (value - low) / max(high - low, 1e-9) * (foot - 8)

    parts = [f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="Largest magnitude of each channel">']
    decades = range(math.ceil(low), math.floor(high) + 1)
    ticks = [float(decade) for decade in decades[:: max(1, len(decades) // 4)]]
    for tick in ticks if len(ticks) > 1 else [low + 0.1, math.log10(max(shown))]:
        parts.append(f'<line class="grid" x1="{AXIS}" y1="{y(tick):.1f}" x2="{WIDTH}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{AXIS - 4}" y="{y(tick) + 4:.1f}" text-anchor="end">{10.0**tick:.3g}</text>')
    for place, value in enumerate(picture.values):
        if is_shown(value):
            top = y(math.log10(value))
            parts.append(_bar(AXIS + place * step, foot, max(step * 0.9, 0.5), foot - top))
    for x, text, anchor in ((AXIS, "channel 0", "start"), (WIDTH, str(last), "end")):
        parts.append(f'<text x="{x:g}" y="{HEIGHT - 4}" text-anchor="{anchor}">{text}</text>')
    return "".join([*parts, "</svg>"])
