"""Bits against recovery: places of points, the line of the unquantized model, names."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from microscale.report.pareto import CHARACTER, HEIGHT, LINE, NUM_COLORS, WIDTH, format_colors, pareto_svg
from microscale.report.study import study_html
from microscale.report.study_rows import StudyReportRow
from report_rows import BASE, MANY, run


def drawn(rows: list[StudyReportRow]) -> ElementTree.Element:
    return ElementTree.fromstring(pareto_svg(rows, format_colors(rows)))


def tags(svg: ElementTree.Element, tag: str, kind: str | None = None) -> list[ElementTree.Element]:
    return [one for one in svg.iter() if one.tag == tag and kind in (None, one.get("class"))]


def test_the_picture() -> None:
    svg = drawn(MANY)
    circles = {str(one[0].text).split(":")[0]: one for one in tags(svg, "circle")}
    assert list(circles) == ["mxfp8, wide", "mxfp4, best", "nvfp4, gptq", "mxfp4, rtn"]
    across = {name: float(one.attrib["cx"]) for name, one in circles.items()}
    up = {name: float(one.attrib["cy"]) for name, one in circles.items()}
    assert across["mxfp4, rtn"] == across["mxfp4, best"] < across["nvfp4, gptq"] < across["mxfp8, wide"]  # more bits
    assert up["mxfp8, wide"] < up["mxfp4, best"] < up["nvfp4, gptq"] < up["mxfp4, rtn"]  # more recovery, further up
    assert across["mxfp8, wide"] > 0.85 * WIDTH and across["mxfp4, rtn"] < 0.15 * WIDTH  # the runs span the picture
    assert all(0 < across[name] < WIDTH and 0 < up[name] < HEIGHT for name in circles)
    (line,) = tags(svg, "polyline")
    assert len(line.attrib["points"].split()) == 2
    assert pareto_svg([BASE], {}) == "" and pareto_svg([], {}) == ""
    assert len(tags(drawn([MANY[1], MANY[1]]), "circle")) == 2  # points that lie on each other


def test_the_unquantized_model_is_a_line_and_no_point() -> None:
    svg = drawn(MANY)
    (line,) = tags(svg, "line", "whole")
    assert line.attrib["y1"] == line.attrib["y2"]
    assert all(float(line.attrib["y1"]) < float(one.attrib["cy"]) for one in tags(svg, "circle"))
    words = [str(one.text) for one in tags(svg, "text")]
    assert "unquantized, 16 bits" in words and "16" not in words
    assert tags(drawn(MANY[1:]), "line", "whole") == []


def test_names_stand_beside_their_points_and_never_over_each_other() -> None:
    crowd = [run(f"method-{i:02}", "mxfp4", 4.25 + 0.25 * (i % 2), 90 + i / 20, is_on_front=i == 39) for i in range(40)]
    svg = drawn([BASE, *crowd])
    names = [one for one in tags(svg, "text") if one.get("data-format")]
    assert len(tags(svg, "circle")) == 40 and 5 < len(names) < 40
    assert [one.text for one in tags(svg, "text", "named")] == ["method-39"]
    heights = {str(one[0].text).split(": ")[0]: float(one.attrib["cy"]) for one in tags(svg, "circle")}
    spans = []
    for one in names:
        assert float(one.attrib["y"]) == pytest.approx(heights[f"mxfp4, {one.text}"] + 4, abs=0.1)
        start, length = float(one.attrib["x"]), CHARACTER * len(str(one.text))
        left = start if one.attrib["text-anchor"] == "start" else start - length
        spans.append((left, left + length, float(one.attrib["y"])))
        assert left > 0 and left + length < WIDTH + 10
    for place, (left, right, y) in enumerate(spans):
        for other_left, other_right, other in spans[place + 1 :]:
            assert right <= other_left or other_right <= left or abs(y - other) >= LINE - 0.2


def test_runs_on_the_front_are_named_even_where_it_is_crowded() -> None:
    rows = [run(f"method-{i}", "mxfp4", 4.25, 95 + i / 1000, is_on_front=True) for i in range(6)]
    assert len(tags(drawn(rows), "text", "named")) == 6


def test_colors_are_those_of_formats() -> None:
    svg = drawn(MANY)
    by_format = {one.attrib["data-format"]: one.attrib["style"] for one in tags(svg, "circle")}
    assert len(set(by_format.values())) == 3
    assert all(by_format[one.attrib["data-format"]] == one.attrib["style"] for one in tags(svg, "circle"))
    page = study_html("s", MANY, tasks=["book", "piqa"], facts={})
    for place in range(NUM_COLORS):
        assert page.count(f"--format-{place}:") == 2, place  # in light and in dark
