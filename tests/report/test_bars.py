"""The bars of perplexity differences: where the axis ends, what is cut, how names break."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from microscale.report.bars import CUT_MARK, axis_limit, difference_bars

pytest.importorskip("matplotlib")


def test_a_bar_far_beyond_the_others_is_cut_and_marked() -> None:
    values = {"mxfp8": 0.1, "mxfp6": 0.2, "mxfp4": 0.5, "nvfp4": 0.4, "int2": 90.0}
    assert axis_limit(list(values.values())) == 0.5
    svg = difference_bars(list(values), values, {})
    assert f"+90.00 {CUT_MARK}" in svg
    assert svg.count(CUT_MARK) == 1
    assert CUT_MARK not in difference_bars(["a", "b"], {"a": 0.01, "b": 90.0}, {})


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ([], 1.0),
        ([-1.0, 0.0], 1.0),
        ([math.nan, 2.0, math.inf], 2.0),
        ([0.1, 0.1, 30.0], 30.0),
        ([0.1, 0.1, 0.1, 30.0], 0.1),
        ([0.03, 0.07, 0.57, 2.57], 2.57),
        ([1.0, 2.0, 3.0, 30.0], 30.0),
        ([1.0, 2.0, 3.0, 30.1], 3.0),
    ],
)
def test_axis_limit(values: list[float], limit: float) -> None:
    assert axis_limit(values) == limit


def test_long_names_are_broken_into_lines() -> None:
    name = "pair(int2/32:fp16:asym,int4/32:fp16:asym,50%)"
    texts = [node.text for node in ElementTree.fromstring(difference_bars([name], {name: 1.0}, {})).iter("text")]
    assert name not in texts
    assert "".join(text or "" for text in texts).count(name) == 1
