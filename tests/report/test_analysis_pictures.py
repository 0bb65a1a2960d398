"""The pictures of analyze: places of points, labels, ticks and bars."""

from __future__ import annotations

import re

from microscale.report.analysis_pictures import (
    ChannelPicture,
    HistogramPicture,
    channels_svg,
    curve_svg,
    grid_of,
    histogram_svg,
)

SHARES = (0.1, 0.2, 0.4, 0.2, 0.1)


def test_the_line_joins_what_nothing_beats() -> None:
    points = [("a", 4.0, 0.1), ("b", 5.0, 0.2), ("c", 6.0, 0.01), ("d", 6.0, 0.05)]
    line = re.search(r'<polyline class="front" points="([^"]*)"', curve_svg(points))
    marks = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', curve_svg(points))
    assert line is not None and line[1].split() == [",".join(marks[0]), ",".join(marks[2])]
    assert curve_svg(points[:1]) == "" and curve_svg([("a", 4.0, 0.0), ("b", 5.0, float("nan"))]) == ""


def test_labels_do_not_overlap() -> None:
    points = [("a", 4.0, 0.1), ("b", 4.5, 0.0100), ("c", 4.5, 0.0099), ("d", 4.5, 0.0098)]
    heights = [float(y) for y in re.findall(r'class="over" x="[\d.]+" y="([\d.]+)"', curve_svg(points))]
    assert heights[2] - heights[1] >= 13 and heights[3] - heights[2] >= 13


def test_grids_of_formats() -> None:
    assert grid_of("mxfp4") == [-1, -4 / 6, -3 / 6, -2 / 6, -1.5 / 6, -1 / 6, -0.5 / 6, 0] + [
        value / 6 for value in (0.5, 1, 1.5, 2, 3, 4, 6)
    ]
    assert grid_of("mxint8") == []
    svg = histogram_svg(HistogramPicture(title="t", shares=SHARES, format="mxfp4"), ["mxfp6_e3m2"])
    assert svg.count('class="bar"') == 5 and svg.count("data-grid=") == 2 and svg.count("display: none") == 1


def test_channels_without_numbers() -> None:
    assert channels_svg(ChannelPicture(title="t", values=(0.0, 0.0), num_channels=2, words="")) == ""
    one = channels_svg(ChannelPicture(title="t", values=(2.0,) * 3, num_channels=3, words=""))
    assert one.count('class="bar"') == 3 and "nan" not in one
