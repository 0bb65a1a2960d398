"""The page of a study: whole in itself, every run and number in it, nothing that a name could break."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest

from microscale.report.study import study_html
from microscale.report.study_rows import StudyCell
from report_rows import BASE, MANY

pytest.importorskip("jinja2")

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
