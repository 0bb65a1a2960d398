"""The comparison page: valid, complete, self-contained, and honest about bars that do not fit."""

from __future__ import annotations

import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from microscale.errors import DependencyError
from microscale.nn.sizes import size_text
from microscale.report.comparison import ComparisonRow, comparison_html, difference_text, number_text

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page: checks that tags nest, collects the table's cells and every attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.table: list[list[str]] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open_tags

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open_tags.append(tag)
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.table and {"td", "th"} & set(self.open_tags):
            self.table[-1][-1] += data.strip()


def row(fmt: str, mode: str, perplexity: float, bits: float = 4.25) -> ComparisonRow:
    return ComparisonRow(
        format=fmt,
        mode=mode,
        bits_per_weight=bits,
        num_bytes=16_318_464,
        model_bits_per_weight=8.5,
        perplexity=perplexity,
        difference=perplexity - 20.0,
    )


ROWS = [
    row("bf16", "none", 20.0, bits=16),
    row("mxfp4", "w", 20.571),
    row("mxfp4", "w+a", 22.834),
    row("nvfp4", "w+a", 20.925, bits=4.5),
    row("mxint8", "w", 19.99, bits=8.25),
]
FACTS = {"model": "llama <30m>", "text": "books.txt", "tokens": "17,391"}
SAMPLES = [("bf16", "It was a dark & stormy night."), ("mxfp4, w+a", "It was <b>a</b> night.")]


@pytest.fixture(scope="module")
def html() -> str:
    return comparison_html("Formats of <llama>", ROWS, facts=FACTS, samples=SAMPLES)


def test_the_table_holds_every_row_and_number(html: str) -> None:
    header, *body = Page(html).table
    assert header == ["format", "quantized", "bits per quantized weight", "whole model", "perplexity", "difference"]
    assert body == [
        ["bf16", "not quantized", "16.00", "16.3 MB, 8.50 bits per weight", "20.00", ""],
        ["mxfp4", "weights", "4.25", "16.3 MB, 8.50 bits per weight", "20.57", "+0.57"],
        ["mxfp4", "weights + activations", "4.25", "16.3 MB, 8.50 bits per weight", "22.83", "+2.83"],
        ["nvfp4", "weights + activations", "4.50", "16.3 MB, 8.50 bits per weight", "20.93", "+0.93"],
        ["mxint8", "weights", "8.25", "16.3 MB, 8.50 bits per weight", "19.99", "−0.01"],
    ]


def test_the_page_needs_nothing_from_outside(html: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe|\ssrc=", html)
    for name, value in Page(html).attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value is not None and value.startswith("#")


def test_facts_and_samples_are_escaped(html: str) -> None:
    text = "".join(Page(html).texts)
    for expected in (*FACTS, *FACTS.values(), "It was <b>a</b> night.", "dark & stormy", "Formats of <llama>"):
        assert expected in text
    assert "<b>" not in html
    assert "&lt;b&gt;a" in html


def test_the_picture_is_well_formed_and_follows_the_page(html: str) -> None:
    svg = html[html.index("<svg") : html.index("</svg>") + len("</svg>")]
    texts = [node.text for node in ElementTree.fromstring(svg).iter("text")]
    for expected in ("mxfp4", "nvfp4", "mxint8", "+0.57", "+2.83", "+0.93", "−0.01"):
        assert expected in texts
    assert "bf16" not in texts
    assert "var(--weights)" in svg
    assert "var(--both)" in svg
    assert "#010a" not in svg


def test_the_page_is_the_same_every_time(html: str) -> None:
    assert comparison_html("Formats of <llama>", ROWS, facts=FACTS, samples=SAMPLES) == html


def test_a_page_without_quantized_rows_has_no_picture() -> None:
    html = comparison_html("one", ROWS[:1], facts={}, samples=[])
    assert "<svg" not in html
    assert "Sample texts" not in html
    assert len(Page(html).table) == 2


def test_numbers_sort_as_numbers_and_non_finite_ones_last() -> None:
    rows = [ROWS[0], row("a", "w", math.inf), row("b", "w", math.nan), row("c", "w", 1234567.8)]
    html = comparison_html("t", rows, facts={}, samples=[])
    _, _, inf, nan, huge = Page(html).table
    assert inf[4:] == ["inf", "+inf"]
    assert nan[4:] == ["nan", "nan"]
    assert huge[4:] == ["1,234,568", "+1,234,548"]
    assert html.count('data-sort="1e308"') == 4
    assert "inf (no finite perplexity)" in html
    assert 'data-sort="1234567.8"' in html


def test_number_texts() -> None:
    assert [number_text(value) for value in (20.494, 999.994, 1000.6)] == ["20.49", "999.99", "1,001"]
    assert [difference_text(value) for value in (0.004, -0.5, math.inf, math.nan)] == ["+0.00", "−0.50", "+inf", "nan"]
    assert [size_text(size) for size in (0, 999, 1500, 10**6, 5 * 10**9, 2 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "1.0 MB",
        "5.0 GB",
        "2.00 TB",
    ]


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_an_absent_library_is_named_with_its_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DependencyError, match=rf"{library}.*microscale\[report\]"):
        comparison_html("t", ROWS, facts=FACTS, samples=SAMPLES)
