"""The page of a study: whole in itself, every run and number in it, nothing that a name could break."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from microscale.report import StudyCell, StudyReportRow, study_html
from microscale.report.pareto import CHARACTER, HEIGHT, LINE, NUM_COLORS, WIDTH, format_colors, pareto_svg

pytest.importorskip("jinja2")

BASE = StudyReportRow(
    model="m",
    format="none",
    method="unquantized",
    state="done",
    message="",
    bits_per_weight=16.0,
    num_bytes=2000,
    seconds=1.0,
    score_seconds=2.0,
    peak_bytes=3_000_000,
    recovery=100.0,
    gap_closure=None,
    cells=(StudyCell(value=20.25, recovery=100.0), None),
    is_on_front=True,
)
ROWS = [
    BASE,
    dataclasses.replace(
        BASE,
        format="mxfp4",
        method="rtn",
        bits_per_weight=4.25,
        recovery=90.125,
        gap_closure=0.0,
        cells=(StudyCell(value=22.5, recovery=90.0, gap_closure=0.0), StudyCell(value=0.5, stderr=0.0125)),
    ),
    dataclasses.replace(
        BASE,
        format="<b>&",
        method="'\"><script>alert(1)</script>",
        state="failed",
        message="FormatError: </dd><script>x",
        bits_per_weight=None,
        recovery=math.nan,
        cells=(None, StudyCell(value=math.inf)),
        is_on_front=False,
    ),
]


class Reader(HTMLParser):
    """Counts tags and checks that they are closed in order."""

    VOID = frozenset(("meta", "br", "line", "polyline"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)
        assert not any(name in ("src", "href") for name, _ in attrs), "the page must need nothing else"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page() -> None:
    page = study_html("A <study>", ROWS, tasks=["book", "piqa"], facts={"date": "today & more"})
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and reader.counts["tr"] == 4 and reader.counts["th"] == 13
    assert reader.counts["script"] == 1 and reader.counts["svg"] == 1 and reader.counts["circle"] == 1
    for words in ("A &lt;study&gt;", "today &amp; more", "22.5000", "± 0.0125", "90.12", "3.0 MB", "FormatError"):
        assert words in page, words
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", page) and "nan" not in page and ">inf" not in page


def drawn(rows: list[StudyReportRow]) -> ElementTree.Element:
    return ElementTree.fromstring(pareto_svg(rows, format_colors(rows)))


def tags(svg: ElementTree.Element, tag: str, kind: str | None = None) -> list[ElementTree.Element]:
    return [one for one in svg.iter() if one.tag == tag and kind in (None, one.get("class"))]


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


def test_colors_are_those_of_formats() -> None:
    svg = drawn(MANY)
    by_format = {one.attrib["data-format"]: one.attrib["style"] for one in tags(svg, "circle")}
    assert len(set(by_format.values())) == 3
    assert all(by_format[one.attrib["data-format"]] == one.attrib["style"] for one in tags(svg, "circle"))
    page = study_html("s", MANY, tasks=["book", "piqa"], facts={})
    for place in range(NUM_COLORS):
        assert page.count(f"--format-{place}:") == 2, place  # in light and in dark


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


def test_filters() -> None:
    rows = [*MANY, *(dataclasses.replace(row, model="<other>") for row in MANY)]
    page = study_html("s", rows, tasks=["book", "piqa"], facts={})
    for words in ("<option>&lt;other&gt;</option>", "<option>nvfp4</option>", 'data-model="m" data-format="nvfp4"'):
        assert words in page, words
    assert "<option>none</option>" not in page
    assert '<tr class="baseline front" data-model="m">' in page  # shown beside every format
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and reader.counts["select"] == 2


def test_a_study_without_results() -> None:
    page = study_html("Nothing yet", [], tasks=["book"], facts={})
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and "svg" not in reader.counts
